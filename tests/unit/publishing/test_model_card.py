from kubetuner.artifacts import EvaluationArtifact, ModelArtifact
from kubetuner.config.sections.objective import (
    EmaSettings,
    LossSettings,
    ReflexSettings,
    RolloutSettings,
    SchedulerChange,
)
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, PushSection, TrainSection
from kubetuner.families import load_family
from kubetuner.publishing.model_card import Usage, render_card


def _card(usage: Usage = "pipeline", **settings: object) -> str:
    model = ModelArtifact(
        fingerprint="m", files=(), family="sdxl", model_type="full", base_model="a/b", base_revision="r", steps=8,
        first_loss=0.5, last_loss=0.25,
    )  # fmt: skip
    evaluation = EvaluationArtifact(
        fingerprint="e", files=(), eval_loss_before=None, eval_loss_after=None, metrics={}, images=()
    )
    scheduler = SchedulerChange(prediction_type="v_prediction") if settings else SchedulerChange()
    ref = ModelRef(family="sdxl", path="a/b", scheduler=scheduler)
    base = {"model": ref, "model_type": "full", "datasets": (), "max_train_steps": 8}
    training = TrainSection.model_validate(base | settings).to_json()
    section = PushSection(model=ref, model_type="full", training=training)
    return render_card(section, model, evaluation, (), load_family("sdxl").facts, usage)


def test_the_card_says_what_was_chosen_of_the_objective() -> None:
    card = _card(loss=LossSettings(snr_gamma=5.0), ema=EmaSettings(), optimizer="optimi-lion")
    assert "- Loss: snr_gamma 5.0\n" in card
    assert "- Averaged weights (EMA): decay 0.995, device cpu, update_interval 1, warmup_steps 0\n" in card
    assert "- Optimizer: optimi-lion\n" in card
    assert "- Prediction type: v_prediction\n" in card


def test_the_card_says_how_samples_were_rolled_out() -> None:
    card = _card(rollout=RolloutSettings(max_offset=5, probability=0.5, reflex=ReflexSettings()))
    (line,) = [line for line in card.splitlines() if line.startswith("- Scheduled sampling:")]
    assert "max_offset 5" in line
    assert "reflex (alpha 1.0, drift_weight 10.0, loss_weight 1.0)" in line
    assert "- Loss: diff2flow yes\n" in _card(loss=LossSettings(diff2flow=True))


def test_the_card_says_how_large_the_batches_of_each_dataset_were() -> None:
    datasets = (
        DatasetSampling(id="a", train_batch_size=8, repeats=2),
        DatasetSampling(id="b", train_batch_size=1, timestep_sampling_offset=-0.5),
    )
    card = _card(datasets=datasets, gradient_accumulation_steps=3)
    assert "- Micro batch size: 1, 8\n" in card
    assert "- Effective batch size: 3 to 24\n" in card
    assert "- Dataset a: 2 repeats, micro batch size 8\n" in card
    assert "- Dataset b: 0 repeats, micro batch size 1, timestep sampling offset -0.5\n" in card
    plain = _card(datasets=(DatasetSampling(id="a"),), train_batch_size=2)
    assert "- Micro batch size: 2\n" in plain
    assert "- Effective batch size: 2\n" in plain
    assert "- Dataset a: 0 repeats\n" in plain


def test_the_card_is_silent_about_what_was_not() -> None:
    card = _card()
    assert not [
        name for name in ("- Loss:", "Flow schedule", "EMA", "Prediction type", "scheduler", "sampling") if name in card
    ]


def test_an_adapters_snippet_draws_as_it_was_trained() -> None:
    change = "from_config(pipeline.scheduler.config, prediction_type='v_prediction')"
    assert change in _card("lora", ema=EmaSettings())
    assert change not in _card("pipeline", ema=EmaSettings())  # Its own scheduler was saved with it.
