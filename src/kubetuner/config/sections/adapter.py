"""The settings of ``model_type: lora``, whatever the kind of adapter."""

from typing import Literal

from kubetuner.config.sections.base import Section

FULL_MATRIX_RANK = 10000
"""A LoKr's ``linear_dim`` by which LyCORIS users mean blocks without decomposition: larger than any block."""


class LoraSettings(Section):
    """``model_type: lora``; for LoKr and LoHa the values come from ``lycoris_config``.

    Attributes:
        algorithm: ``lora`` (``lora_type: standard``), or ``lokr`` or ``loha`` (``lora_type: lycoris``).
        rank: ``lora_rank``, or ``linear_dim``.
        alpha: ``lora_alpha``, or ``linear_alpha``; equals ``rank`` unless set.
        dropout: ``lora_dropout`` in 0..1: share of a LoRA's inputs that is left out.
        init_type: ``lora_init_type``; ``olora`` and ``pissa`` start from a factorisation of the base's weights.
        use_dora: A LoRA whose weights' magnitude is trained apart from their direction.
        target_modules: ``peft_lora_target_modules``: names of layers; empty for the family's own.
        target_classes: ``target_module`` of a LyCORIS preset: all layers inside modules of these classes.
        factor: LoKr's ``factor``: the largest edge of its first block; -1 for as square as possible.
        decompose_both: LoKr's: the first block is of low rank too.
        tucker: ``use_tucker``: convolutions are decomposed along their kernel too.
        rank_dropout: Share in 0..1 of output rows that is left out.
        module_dropout: Share in 0..1 of layers whose adapter is left out.
        init_lora: Adapter to start from: a folder, or a ``.safetensors`` file of diffusers' kind; empty for none.
        init_lora_revision: Hash of its contents; resolved by ``plan``.
    """

    algorithm: Literal["lora", "lokr", "loha"] = "lora"
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.1
    init_type: Literal["default", "gaussian", "olora", "pissa"] = "default"
    use_dora: bool = False
    target_modules: tuple[str, ...] = ()
    target_classes: tuple[str, ...] = ()
    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_lora: str = ""
    init_lora_revision: str = ""

    @property
    def full_rank(self) -> bool:
        """Whether a LoKr's blocks are not decomposed."""
        return self.rank >= FULL_MATRIX_RANK

    @property
    def title(self) -> str:
        """What people call it: ``LoRA``, ``DoRA``, ``LoKr`` or ``LoHa``."""
        if self.use_dora:
            return "DoRA"
        return {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}[self.algorithm]
