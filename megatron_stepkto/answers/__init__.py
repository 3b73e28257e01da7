"""Final answers: where a solution states one, and whether two are equal. Nothing is ever evaluated."""
