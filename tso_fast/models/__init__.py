"""Language models: tokenising text, loading from folders, and the policy, whose forward pass computes the loss."""
