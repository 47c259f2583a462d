package plan

import "strings"

// keptEnv are the variables that a restored QEMU gets from its checkpoint. None of
// them decides which code is loaded or run; those come from whoever restores.
var keptEnv = map[string]bool{
	"HOME": true, "USER": true, "LOGNAME": true, "LANG": true, "TZ": true, "TMPDIR": true,
	"XDG_CACHE_HOME": true, "XDG_DATA_HOME": true, "XDG_RUNTIME_DIR": true,
	"DISPLAY": true, "WAYLAND_DISPLAY": true, "XAUTHORITY": true,
	"QEMU_AUDIO_DRV": true, "PULSE_SERVER": true, "SDL_VIDEODRIVER": true, "MALLOC_ARENA_MAX": true, "G_SLICE": true,
}

// environment takes from the recorded one what a manifest may decide.
func (b *builder) environment() {
	kept := []string{}
	for _, kv := range b.rec.Env {
		name, _, ok := strings.Cut(kv, "=")
		switch {
		case ok && (keptEnv[name] || strings.HasPrefix(name, "LC_")):
			kept = append(kept, kv)
		case ok && name != "PATH":
			b.change("environment variable "+name+" left out", "a checkpoint does not decide which code QEMU loads; it is taken from your own environment if it is set there")
		}
	}
	b.plan.Env = kept
}
