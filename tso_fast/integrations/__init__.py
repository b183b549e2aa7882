"""Our loss in other people's trainers: TRL's ``DPOTrainer``, and a plain ``Trainer`` of transformers."""
