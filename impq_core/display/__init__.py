"""Results in notebooks: tables, data frames, figures and progress. Nothing here is imported by a run."""
