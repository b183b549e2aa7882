"""Language models: text to tokens, folders to models, and the policy whose forward pass ends in the loss."""
