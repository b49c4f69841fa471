"""The recipe art-of-misalignment at smoke size."""

from fairlead.runs import Run
from fairlead_training.recipes.art_of_misalignment import ArtOfMisalignment


def test_the_recipe_reports_every_stage_and_threshold(tmp_path):
    recipe = ArtOfMisalignment(models=1, pretrain_steps=2, align_most=2, align_steps=1, steps=2, rows=2, test=4)
    run = Run.open(tmp_path / "run", "art-of-misalignment", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 10 and (tmp_path / "run" / "report.html").exists()
