package plan

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
)

// maxIncludes bounds -readconfig files that include others.
const maxIncludes = 16

// entry is one option on its way from the recorded to the new command line.
type entry struct {
	cmdline.Option
	kv     *cmdline.KeyVal // nil when the option has no key=value form
	mapped map[string]bool // keys that --map changed; "" is the plain value
}

// get is kv.Get for entries that may have no keys.
func (e *entry) get(key string) string {
	if e.kv == nil {
		return ""
	}
	v, _ := e.kv.Get(key)
	return v
}

// isOn reads a switch the way QEMU does.
func (e *entry) isOn(key string) bool { return isOn(e.get(key)) }

func isOn(v string) bool { return v == "on" || v == "yes" || v == "true" || v == "y" }

type builder struct {
	rec  Recorded
	opt  Options
	plan *Plan
	maps *mapper
	opts []*entry
	// legacy counts, by option, the paths that were given out for character devices in
	// the old syntax.
	legacy map[string]int
}

// Build makes the plan. Errors are *problem.Error: Usage for what the operator
// asked, Refused for what cannot be rebuilt.
func Build(rec Recorded, opt Options) (*Plan, error) {
	b := &builder{rec: rec, opt: opt, maps: newMapper(opt.Map), legacy: map[string]int{}, plan: &Plan{
		Binary: rec.Binary, UID: rec.UID, GID: rec.GID, Groups: rec.Groups,
		Cwd: rec.Cwd, Machine: rec.Machine, Paused: rec.Paused,
		RunDir: opt.RunDir, QMPPath: opt.QMPPath, Clone: opt.CloneID,
		Changes: []Change{}, Files: []File{}, Listen: []Socket{},
	}}
	if opt.Binary != "" {
		b.plan.Binary = opt.Binary
		b.change("-qemu "+opt.Binary, "asked for instead of "+rec.Binary)
	}
	if b.plan.QMPPath == "" {
		b.plan.QMPPath = filepath.Join(opt.RunDir, "qmp.sock")
	}
	if rec.Machine == "" {
		return nil, b.refuse("machine", "the checkpoint does not say which machine type it was taken on").
			WithHint("inspect the checkpoint: it was not written by ckagent, or is damaged")
	}
	if err := b.parse(rec.Argv, rec.Changes); err != nil {
		return nil, err
	}
	b.environment()
	b.identity()
	b.collectOld()
	for _, step := range []func() error{
		b.secrets, b.applyMap, b.earlier, b.managed, b.disks, b.machine, b.memory, b.endpoints, b.network, b.storage, b.clone,
		b.maps.unused, b.extra, b.files,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	b.finish()
	return b.plan, nil
}

// parse turns the arguments into entries, with -readconfig files inlined and
// what an earlier start or restore needed removed.
func (b *builder) parse(argv, changes []string) error {
	opts, err := cmdline.Parse(slices.Concat(argv, changes))
	if err != nil {
		return b.refuse("recorded command line", "%w", err)
	}
	includes := 0
	var add func(opts []cmdline.Option) error
	add = func(opts []cmdline.Option) error {
		for _, o := range opts {
			if o.Name == "readconfig" {
				if includes++; includes > maxIncludes || b.opt.ReadFile == nil {
					return b.refuse("-readconfig "+o.Value, "more configuration files than can be followed")
				}
				data, err := b.opt.ReadFile(b.maps.path(o.Value, true))
				if err != nil {
					return problem.New(problem.Refused, "plan restore", "-readconfig "+o.Value, "%w", err).
						WithHint("put the file back, or map it: --map %s=NEWPATH", o.Value)
				}
				inner, err := cmdline.ParseConfig(bytes.NewReader(data))
				if err != nil {
					return b.refuse("-readconfig "+o.Value, "%w", err)
				}
				if err := add(inner); err != nil {
					return err
				}
				b.change("-readconfig "+o.Value, "its content takes its place, so that it can be rewritten")
				continue
			}
			e := &entry{Option: o, mapped: map[string]bool{}}
			if _, ok := cmdline.Implied(o.Name); ok && o.HasValue {
				if e.kv, err = o.KeyVal(); err != nil {
					return b.refuse("-"+o.Name+" "+o.Value, "%w", err)
				}
			}
			if b.keep(e) {
				b.opts = append(b.opts, e)
			}
		}
		return nil
	}
	if err := add(opts); err != nil {
		return err
	}
	b.inlineSet()
	return nil
}

// inlineSet puts the value of each -set GROUP.ID.KEY=VALUE into the option it is about,
// where it is seen and rewritten like any other. QEMU applies it after that option: left
// alone it would give a drive its original image back.
func (b *builder) inlineSet() {
	b.drop(func(e *entry) bool {
		target, val, ok := strings.Cut(e.Value, "=")
		group, rest, grouped := strings.Cut(target, ".")
		id, key, keyed := strings.Cut(rest, ".")
		if e.Name != "set" || !ok || !grouped || !keyed || key == "" {
			return false
		}
		for o := range b.named(group) {
			if o.kv != nil && o.get("id") == id {
				o.kv.Set(key, val)
				b.change("-set "+e.Value, "the option it changes says so itself")
				return true
			}
		}
		return false
	})
}

// keep decides about options that must not be repeated at all.
func (b *builder) keep(e *entry) bool {
	switch e.Name {
	case "S", "incoming":
		return false // given again by finish
	case "loadvm":
		b.change("-loadvm "+e.Value+" removed", "the checkpoint's state takes its place")
		return false
	case "daemonize":
		b.change("-daemonize removed", "ckagent starts it in a session and cgroup of its own")
		return false
	case "preconfig":
		b.change("-preconfig removed", "the machine is configured by its arguments")
		return false
	case "chardev":
		return e.get("id") != ownQMP
	case "mon":
		return e.get("chardev") != ownQMP
	case "writeconfig":
		return false
	}
	return true
}

// identity reads what the original is called.
func (b *builder) identity() {
	b.plan.Name = b.rec.VM
	for e := range b.named("name") {
		if n := e.get("guest"); n != "" {
			b.plan.OldName, b.plan.Name = n, n
		}
	}
	for e := range b.named("uuid") {
		b.plan.OldUUID, b.plan.UUID = e.Value, e.Value
	}
}

// clone gives a clone its own name and UUID; the VM generation id changes for
// every restore, because the guest's time went backwards.
func (b *builder) clone() error {
	for e := range b.named("device") {
		if e.get("driver") == "vmgenid" && e.get("guid") != "auto" {
			e.kv.Set("guid", "auto")
			b.change("vmgenid guid=auto", "the guest has to notice that it went back in time")
		}
	}
	if b.opt.CloneID == "" {
		return nil
	}
	b.plan.Name += "-clone-" + b.opt.CloneID
	named := false
	for e := range b.named("name") {
		e.kv.Set("guest", b.plan.Name)
		named = true
	}
	if !named {
		b.append("name", "guest="+cmdline.Escape(b.plan.Name))
	}
	b.change("-name "+b.plan.Name, "a clone has a name of its own")
	for e := range b.named("uuid") {
		e.Value = cloneUUID(b.opt.CloneID, e.Value)
		b.plan.UUID = e.Value
		b.change("-uuid "+e.Value, "a clone has a UUID of its own; the running guest sees it after its next boot")
	}
	return nil
}

// extra appends the operator's own arguments.
func (b *builder) extra() error {
	opts, err := cmdline.Parse(b.opt.Extra)
	if err != nil {
		return problem.New(problem.Usage, "plan restore", "arguments after --", "%w", err)
	}
	for _, o := range opts {
		switch o.Name {
		case "incoming", "loadvm", "daemonize", "S", "preconfig":
			return problem.New(problem.Usage, "plan restore", "argument -"+o.Name, "a restore sets it itself")
		}
		e := &entry{Option: o, mapped: map[string]bool{}}
		if _, ok := cmdline.Implied(o.Name); ok && o.HasValue {
			if e.kv, err = o.KeyVal(); err != nil {
				return problem.New(problem.Usage, "plan restore", "argument -"+o.Name, "%w", err)
			}
		}
		b.opts = append(b.opts, e)
	}
	return nil
}

// finish renders the command line.
func (b *builder) finish() {
	b.append("chardev", "socket,id="+ownQMP+",fd="+QMPFD+",server=on,wait=off")
	b.append("mon", "chardev="+ownQMP+",mode=control")
	b.append("incoming", "defer")
	b.plan.Args = cmdline.Render(append(b.options(), cmdline.Option{Name: "S"}))
}

// options are the options as they stand now.
func (b *builder) options() []cmdline.Option {
	opts := make([]cmdline.Option, 0, len(b.opts)+1)
	for _, e := range b.opts {
		if e.kv != nil {
			e.Value = e.kv.String()
		}
		opts = append(opts, e.Option)
	}
	return opts
}

// --- helpers of all steps

// named iterates over the options of these names.
func (b *builder) named(names ...string) func(yield func(*entry) bool) {
	return func(yield func(*entry) bool) {
		for _, e := range b.opts {
			if slices.Contains(names, e.Name) && !yield(e) {
				return
			}
		}
	}
}

// drop removes the entries for which del is true.
func (b *builder) drop(del func(*entry) bool) {
	b.opts = slices.DeleteFunc(b.opts, del)
}

// append adds an option; value must be what ParseKeyVal accepts for it.
func (b *builder) append(name, value string) *entry {
	e := &entry{Option: cmdline.Option{Name: name, Value: value, HasValue: true}, mapped: map[string]bool{}}
	if _, ok := cmdline.Implied(name); ok {
		// Values written here are constants of this package and escaped parts.
		e.kv, _ = e.KeyVal()
	}
	b.opts = append(b.opts, e)
	return e
}

func (b *builder) change(what, why string) {
	c := Change{What: what, Why: why}
	if !slices.Contains(b.plan.Changes, c) {
		b.plan.Changes = append(b.plan.Changes, c)
	}
}

func (b *builder) refuse(object, format string, args ...any) *problem.Error {
	return problem.New(problem.Refused, "plan restore", object, format, args...)
}

// own is a path in QEMU's part of the run directory for something called name.
func (b *builder) own(name string) string {
	clean := strings.Map(func(r rune) rune {
		if r == '/' || r == 0 || r == ',' {
			return '_'
		}
		return r
	}, name)
	return filepath.Join(b.opt.RunDir, VMDir, clean)
}

// freshID returns an id of ours that the command line does not use yet.
func (b *builder) freshID(stem string) string {
	for i := 0; ; i++ {
		id := ownPrefix + stem + strconv.Itoa(i)
		if !slices.ContainsFunc(b.opts, func(e *entry) bool { return e.get("id") == id }) {
			return id
		}
	}
}

// abs resolves a path of the command line against the recorded directory.
func (b *builder) abs(path string) string {
	if path == "" || filepath.IsAbs(path) || b.rec.Cwd == "" {
		return path
	}
	return filepath.Join(b.rec.Cwd, path)
}

// CommandLine is the plan's command line for a person, quoted for a shell.
func (p *Plan) CommandLine() string {
	words := make([]string, 0, len(p.Args)+1)
	for _, a := range slices.Concat([]string{p.Binary}, p.Args) {
		words = append(words, shellQuote(a))
	}
	return strings.Join(words, " ")
}

func shellQuote(s string) string {
	plain := s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-+=:,./@%{}", r))
	}) < 0
	if plain {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// String lists the plan for --dry-run.
func (p *Plan) String() string {
	var w strings.Builder
	fmt.Fprintf(&w, "%s\n", p.CommandLine())
	fmt.Fprintf(&w, "in %s as uid %d gid %d; QMP at %s\n", p.Cwd, p.UID, p.GID, p.QMPPath)
	for _, c := range p.Changes {
		fmt.Fprintf(&w, "changed: %s: %s\n", c.What, c.Why)
	}
	return w.String()
}
