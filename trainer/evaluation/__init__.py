"""Everything that is computed from scores, without a model and without torch: anybody's scores will do.

    scores      the scores Parquet: one row per frame     statistics  clustered bootstrap, seeds, Holm, power
    frames      average precision, calibration            figures     the plots, as SVG and PNG
    events      speech events, matched in time            report      report.html
    state       replayed transitions                      text        matching by meaning (ProAssist's)
    chunks      EgoProactive's metrics per chunk
    measure     all of it, of one model in one mode       folder      what benchmark left on disk
    verdict     from a scores file to metrics.json        moments     clips where two arms differ most

Imports point one way: verdict -> measure -> frames, events, state -> scores; report -> figures, folder, moments.
"""
