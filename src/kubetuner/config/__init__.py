"""The configuration: SimpleTuner's flat keys in, one frozen typed section per step out."""
