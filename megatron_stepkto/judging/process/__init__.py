"""Which steps of a solution are right: exact rules, a language model, a reward model, rollouts."""
