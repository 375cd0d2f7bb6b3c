"""The lessons in a folder of the learner's, with or without the solutions."""
