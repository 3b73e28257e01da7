"""The built-in miniature task: word problems in which an exact rule can judge every step."""
