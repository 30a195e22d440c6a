"""Tasks of lm-eval, and files of questions, on the models of a run or an export."""
