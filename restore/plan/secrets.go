package plan

import (
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// secrets puts files in the place of secrets that a checkpoint does not keep.
func (b *builder) secrets() error {
	used := map[string]bool{}
	for e := range b.named("object") {
		id := e.get("id")
		file, given := b.opt.Secrets[id]
		if !strings.HasPrefix(e.get("qom-type"), "secret") || !given {
			continue
		}
		used[id] = true
		// Whatever the recorded form was (an encrypted blob, base64), the file
		// the operator names holds the plain secret.
		for _, key := range []string{"data", "format", "keyid", "iv"} {
			e.kv.Delete(key)
		}
		e.kv.Set("file", file)
		b.change("-object secret "+id+" from "+file, "secrets are not kept in checkpoints")
	}
	for id := range b.opt.Secrets {
		if !used[id] {
			return problem.New(problem.Usage, "apply --secret", id, "the recorded command line has no secret object of that id")
		}
	}
	for _, e := range b.opts {
		v := e.Value
		if e.kv != nil {
			v = e.kv.String()
		}
		if !strings.Contains(v, image.RedactedMark) {
			continue
		}
		id := e.get("id")
		if e.Name == "object" && strings.HasPrefix(e.get("qom-type"), "secret") {
			return b.refuse("secret "+id, "its value was not recorded").
				WithHint("put it into a file that only root can read and give --secret %s=FILE", id)
		}
		key := ""
		if e.kv != nil {
			i := slices.IndexFunc(e.kv.Keys(), func(k string) bool {
				val, _ := e.kv.Get(k)
				return strings.Contains(val, image.RedactedMark)
			})
			if i >= 0 {
				key = " " + e.kv.Keys()[i]
			}
		}
		return b.refuse("-"+e.Name+key, "its value was not recorded, because it is a secret").
			WithHint("let the VM take it from a secret object: -object secret,id=ID,file=FILE")
	}
	return nil
}
