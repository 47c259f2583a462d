package vm

import (
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// Change is one difference between the command line and the machine as it is,
// recorded as what to do to the former.
type Change struct {
	Kind   string   `json:"kind"`          // append, remove, replace
	Old    []string `json:"old,omitempty"` // arguments taken out
	New    []string `json:"new,omitempty"` // arguments put in
	Reason string   `json:"reason"`
}

// composer edits a command line and keeps account.
type composer struct {
	opts    []cmdline.Option
	gone    []bool
	config  []cmdline.Option // what -readconfig files stand for: known, not editable here
	changes []Change
	refused []Refusal
}

func newComposer(opts []cmdline.Option) *composer {
	return &composer{opts: slices.Clone(opts), gone: make([]bool, len(opts))}
}

func (c *composer) refuse(code, object, reason, advice string) {
	c.refused = append(c.refused, Refusal{Code: code, Object: object, Reason: reason, Advice: advice})
}

func (c *composer) add(o cmdline.Option, reason string) {
	c.opts, c.gone = append(c.opts, o), append(c.gone, false)
	c.changes = append(c.changes, Change{Kind: "append", New: cmdline.Render([]cmdline.Option{o}), Reason: reason})
}

func (c *composer) remove(i int, reason string) {
	c.gone[i] = true
	c.changes = append(c.changes, Change{Kind: "remove", Old: cmdline.Render(c.opts[i : i+1]), Reason: reason})
}

func (c *composer) replace(i int, o cmdline.Option, reason string) {
	old := cmdline.Render(c.opts[i : i+1])
	c.opts[i] = o
	c.changes = append(c.changes, Change{Kind: "replace", Old: old, New: cmdline.Render(c.opts[i : i+1]), Reason: reason})
}

// set replaces the value of an option by an edited one.
func (c *composer) set(i int, kv *cmdline.KeyVal, reason string) {
	o := c.opts[i]
	if o.Value = kv.String(); o.Value != c.opts[i].Value {
		c.replace(i, o, reason)
	}
}

// result is the command line with every change applied.
func (c *composer) result() []cmdline.Option {
	var out []cmdline.Option
	for i := range c.opts {
		if !c.gone[i] {
			out = append(out, c.opts[i])
		}
	}
	return out
}

// located is an option with its place; index -1 is one of a configuration file.
type located struct {
	index int
	opt   cmdline.Option
	kv    *cmdline.KeyVal
}

// named returns the options of this name that have key=value form.
func (c *composer) named(names ...string) []located {
	var out []located
	take := func(i int, o cmdline.Option) {
		if !slices.Contains(names, o.Name) {
			return
		}
		if kv, err := o.KeyVal(); err == nil {
			out = append(out, located{i, o, kv})
		}
	}
	for i, o := range c.opts {
		if !c.gone[i] {
			take(i, o)
		}
	}
	for _, o := range c.config {
		take(-1, o)
	}
	return out
}

// byID finds the option of this name with the given id.
func (c *composer) byID(id string, names ...string) (located, bool) {
	for _, l := range c.named(names...) {
		if got, ok := l.kv.Get("id"); ok && got == id {
			return l, true
		}
	}
	return located{}, false
}

// editable refuses a change to what stands in a configuration file.
func (c *composer) editable(l located, object, what string) bool {
	if l.index >= 0 {
		return true
	}
	c.refuse("readconfig", object, what+", but a -readconfig file describes it", "give the options on the command line")
	return false
}

// lastWord is the last component of a QOM path.
func lastWord(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }
