"""What tests need: tiny models, error budgets, real prompts, poisoned memory."""
