"""The built-in miniature task: word problems whose every step an exact rule can judge."""
