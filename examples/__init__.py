"""Programs that train real models, once with stock layers and once after `swap_`."""
