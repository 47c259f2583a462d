package vm

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// Secret is something the machine was started with, or given since, that is not
// recorded: whoever restores is asked for it.
type Secret struct {
	Placeholder string `json:"placeholder"` // stands in the argument; "" when given at run time only
	Option      string `json:"option"`      // "object", "vnc", ...
	ID          string `json:"id,omitempty"`
	Key         string `json:"key"`
	Prompt      string `json:"prompt"`
}

// secretKeys are option keys whose value is a secret wherever they appear. Keys
// that only name a secret object ("password-secret", "key-secret", "passwordid")
// are not among them.
var secretKeys = map[string]bool{
	"password": true, "passwd": true, "passphrase": true, "pass": true, "secret": true,
	"token": true, "cookie": true, "http-password": true, "iscsi-password": true,
}

// urlUser matches user:password@ in an address.
var urlUser = regexp.MustCompile(`([a-z][a-z0-9+.-]*://[^/@:\s,]*:)([^@/\s]+)(@)`)

// iscsiUser matches iscsi://user%password@, QEMU's own way.
var iscsiUser = regexp.MustCompile(`(iscsi://[^/@%\s,]*%)([^@/\s]+)(@)`)

// rbdKey matches key= inside an rbd: address.
var rbdKey = regexp.MustCompile(`(^rbd:.*:key=)([^:]+)()`)

// secretBlobs are firmware configuration names under which credentials are handed
// to a guest (systemd's among them).
var secretBlobs = regexp.MustCompile(`(?i)credential|passw|secret|token|/key`)

// redactor replaces secrets by placeholders.
type redactor struct{ secrets []Secret }

func (r *redactor) take(option, id, key, prompt string) string {
	p := fmt.Sprintf("@ckagent:secret:%d@", len(r.secrets)+1)
	r.secrets = append(r.secrets, Secret{Placeholder: p, Option: option, ID: id, Key: key, Prompt: prompt})
	return p
}

// options returns a copy of opts without secrets.
func (r *redactor) options(opts []cmdline.Option) []cmdline.Option {
	out := slices.Clone(opts)
	for i := range out {
		if out[i].HasValue {
			out[i].Value = r.value(&out[i])
		}
	}
	return out
}

func (r *redactor) value(o *cmdline.Option) string {
	kv, err := o.KeyVal()
	if err != nil {
		return r.text(o.Name, "", o.Name, o.Value)
	}
	id, _ := kv.Get("id")
	kind, _ := kv.Get("qom-type")
	name, _ := kv.Get("name")
	kv.Rewrite(func(key, val string) string {
		last := key[strings.LastIndexByte(key, '.')+1:]
		switch {
		case val == "" || strings.HasPrefix(val, "@ckagent:secret:"):
			return val
		case o.Name == "vnc" && last == "password" || o.Name == "spice" && last == "disable-ticketing":
			return val // on or off: the password itself is set through the monitor
		case strings.HasPrefix(kind, "secret") && last == "data":
			return r.take(o.Name, id, key, "the data of secret "+id)
		case o.Name == "fw_cfg" && last == "string" && secretBlobs.MatchString(name):
			return r.take(o.Name, name, key, "the string of fw_cfg "+name)
		case o.Name == "smbios" && last == "value" && secretBlobs.MatchString(val):
			return r.take(o.Name, "", key, "the value of the smbios string")
		case secretKeys[last]:
			return r.take(o.Name, id, key, strings.TrimSpace(o.Name+" "+id+": "+key))
		}
		return r.text(o.Name, id, key, val)
	})
	return kv.String()
}

// text takes secrets out of addresses.
func (r *redactor) text(option, id, key, val string) string {
	for _, re := range []*regexp.Regexp{urlUser, iscsiUser, rbdKey} {
		val = re.ReplaceAllStringFunc(val, func(m string) string {
			parts := re.FindStringSubmatch(m)
			return parts[1] + r.take(option, id, key, "the password in "+strings.TrimSpace(option+" "+id)+" "+key) + parts[3]
		})
	}
	return val
}

// Environment variables a restored QEMU gets back. Values are not secret, and
// none of them decides which code is loaded.
var keptEnv = map[string]bool{
	"PATH": true, "HOME": true, "USER": true, "LOGNAME": true, "LANG": true, "TZ": true, "TMPDIR": true,
	"XDG_CACHE_HOME": true, "XDG_CONFIG_HOME": true, "XDG_DATA_HOME": true, "XDG_RUNTIME_DIR": true,
	"QEMU_AUDIO_DRV": true, "PULSE_SERVER": true, "SDL_VIDEODRIVER": true, "MALLOC_ARENA_MAX": true, "G_SLICE": true,
}

// loaderEnv are variables that do decide that. They are kept apart, since a
// manifest is data: whoever restores must judge them before use.
var loaderEnv = map[string]bool{"LD_LIBRARY_PATH": true, "QEMU_MODULE_DIR": true}

// splitEnv sorts an environment into what is kept and what names code.
func splitEnv(environ []string) (kept, loader []string) {
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		switch {
		case keptEnv[name] || strings.HasPrefix(name, "LC_"):
			kept = append(kept, e)
		case loaderEnv[name]:
			loader = append(loader, e)
		}
	}
	slices.Sort(kept)
	slices.Sort(loader)
	return kept, loader
}
