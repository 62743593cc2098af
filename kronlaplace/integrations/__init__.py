"""Our estimators inside other libraries; each module needs its library installed, and nothing else here imports it."""
