package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// Machine is everything needed to build the same machine again.
type Machine struct {
	Name  string `json:"name"`
	UUID  string `json:"uuid"`
	Type  string `json:"type"` // versioned: pc-i440fx-7.2
	Accel string `json:"accel"`

	QEMUVersion   string `json:"qemu_version"` // 7.2.22
	QEMUPackage   string `json:"qemu_package,omitempty"`
	Binary        string `json:"binary"`
	BinaryDeleted bool   `json:"binary_deleted"` // replaced since: an upgrade, most likely

	Argv    []string `json:"argv"`    // as started, argv[0] first, secrets replaced by placeholders
	Changes []Change `json:"changes"` // what became of it since
	Current []string `json:"current"` // Argv with Changes applied: what makes this machine now
	Secrets []Secret `json:"secrets"` // to be asked for again

	Env       []string `json:"env"`                  // NAME=value, allow-listed
	LoaderEnv []string `json:"loader_env,omitempty"` // names code to load: to be judged before use
	UID       int      `json:"uid"`
	GID       int      `json:"gid"`
	Groups    []int    `json:"groups,omitempty"`
	Cwd       string   `json:"cwd"`
	Root      string   `json:"root"`
	Manager   string   `json:"manager,omitempty"` // libvirt, proxmox: who started it
	Libvirt   *Domain  `json:"libvirt,omitempty"` // of a VM that libvirt manages, as its daemon describes it
	// Kinds of namespace (mnt, net, pid, ...) in which it is not where we are:
	// paths, interfaces and sockets of its command line are meant there.
	Namespaces []string `json:"namespaces,omitempty"`

	CPU    CPUModel       `json:"cpu"`
	SMP    map[string]int `json:"smp"` // cpus, maxcpus, sockets, cores, threads, ...
	RTC    string         `json:"rtc"` // value of -rtc, "" for QEMU's default (base=utc,clock=host)
	VCPUs  []VCPU         `json:"vcpus"`
	State  string         `json:"state"` // run state when described
	Blocks []RAMBlock     `json:"blocks"`
	Disks  []Disk         `json:"disks"`

	Refusals []Refusal `json:"refusals"` // what keeps it from being built again
}

// CPUModel is the vCPU model as QEMU resolved it.
type CPUModel struct {
	Argument string         `json:"argument"`        // value of -cpu, "" when the default
	Type     string         `json:"type"`            // QOM type: qemu64-x86_64-cpu
	Model    string         `json:"model"`           // name of the expansion: "base" for a static one
	Props    map[string]any `json:"props,omitempty"` // every feature
	How      string         `json:"how"`             // static, full, or argument when QEMU does not expand
	Features CPUFeatures    `json:"-"`               // what the guest sees of it
}

// describer is the state of one description.
type describer struct {
	t          *Target
	c          *composer
	redact     *redactor
	defaultRAM string // id of the backend the machine makes for -m
	made       int    // block nodes named by us
}

// Describe reads everything that must be recorded to build this machine again,
// and compares the command line it was started with to the machine as it is.
// Each difference is a Change or, where no argument expresses it, a Refusal.
// Nothing is changed. Layout is resolved if it was not before.
func (t *Target) Describe(ctx context.Context) (Machine, error) {
	m, err := t.describe(ctx)
	if err == nil {
		return m, nil
	}
	if gone := t.Process.Check(); gone != nil {
		return Machine{}, gone
	}
	if e, ok := errors.AsType[*problem.Error](err); ok {
		return Machine{}, e
	}
	return Machine{}, problem.New(problem.CodeOf(err), "describe", t.Process.String(), "%w", err)
}

func (t *Target) describe(ctx context.Context) (Machine, error) {
	p := t.Process
	m := Machine{
		Name: t.Name, UUID: t.UUID, Type: t.Machine, Accel: t.Accel,
		QEMUVersion: t.Version.String(), QEMUPackage: t.Version.Package, Binary: p.Exe, BinaryDeleted: p.ExeDeleted,
		UID: p.UID, GID: p.GID, Groups: p.Groups, Cwd: p.Cwd, Root: p.Root,
	}
	raw, err := readBounded(p.Path("environ"), 8<<20)
	if err != nil {
		return m, fmt.Errorf("environment: %w", err)
	}
	environ := parseCmdline(raw)
	m.Env, m.LoaderEnv = splitEnv(environ)
	m.Manager = t.manager()
	var missing []Secret
	if m.Manager == ManagerLibvirt {
		if m.Libvirt, missing, err = t.domain(ctx); err != nil {
			return m, err
		}
	}
	own, err := readNamespaces("/proc/self/ns")
	if err != nil {
		return m, err
	}
	for kind, ino := range p.Namespaces {
		if own[kind] != ino {
			m.Namespaces = append(m.Namespaces, kind)
		}
	}
	slices.Sort(m.Namespaces)
	if t.Blocks == nil {
		if _, err := t.Layout(ctx); err != nil {
			return m, err
		}
	}
	m.Blocks = t.Blocks
	if m.VCPUs, err = t.ReadVCPUs(ctx); err != nil {
		return m, err
	}
	s, err := t.Status(ctx)
	if err != nil {
		return m, err
	}
	m.State = s.State
	if m.SMP, err = qomGet[map[string]int](ctx, t.QMP, "/machine", "smp"); err != nil {
		return m, fmt.Errorf("smp: %w", err)
	}
	if m.CPU, err = t.cpuModel(ctx, m.VCPUs); err != nil {
		return m, err
	}
	if m.Disks, err = t.Disks(ctx); err != nil {
		return m, err
	}
	d := &describer{t: t, redact: &redactor{}}
	redacted := d.redact.options(t.Options)
	d.c = newComposer(redacted)
	if err := d.compare(ctx, m.Disks); err != nil {
		return m, err
	}
	for _, o := range t.Options {
		if o.Name == "rtc" {
			m.RTC = o.Value
		}
	}
	m.Argv = append([]string{p.Argv[0]}, cmdline.Render(redacted)...)
	m.Current = append([]string{p.Argv[0]}, cmdline.Render(d.c.result())...)
	m.Changes, m.Refusals, m.Secrets = d.c.changes, d.c.refused, append(d.redact.secrets, missing...)
	return m, nil
}

// compare runs every comparison, in the order in which QEMU creates things.
func (d *describer) compare(ctx context.Context, disks []Disk) error {
	if err := d.readConfig(); err != nil {
		return err
	}
	// The default RAM backend's id is the machine's own; ours is the block that
	// belongs to an object no option makes and that -m sizes.
	link, err := qomGet[string](ctx, d.t.QMP, "/machine", "memory-backend")
	if err != nil {
		if _, ok := errors.AsType[*qmp.Error](err); !ok {
			return err
		}
	}
	d.defaultRAM = lastWord(link)
	d.started()
	for _, step := range []func(context.Context) error{
		d.objects, d.chardevs, d.networks,
		func(ctx context.Context) error { return d.media(ctx, disks) },
		d.devices, d.descriptors, d.passwords,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	d.files()
	return nil
}

// maxConfigFile bounds a -readconfig file.
const maxConfigFile = 1 << 20

// readConfig takes in what -readconfig files describe. The file may have been
// edited since QEMU read it; what it says is only used to find options in.
func (d *describer) readConfig() error {
	for _, o := range d.c.opts {
		if o.Name != "readconfig" {
			continue
		}
		raw, err := readBounded(d.t.Process.Outside(o.Value), maxConfigFile)
		if errors.Is(err, os.ErrNotExist) {
			continue // refused as a missing file
		}
		if err != nil {
			return err
		}
		opts, err := cmdline.ParseConfig(strings.NewReader(string(raw)))
		if err != nil {
			d.c.refuse("readconfig", o.Value, "it cannot be understood: "+err.Error(), "give the options on the command line")
			continue
		}
		d.c.config = append(d.c.config, d.redact.options(opts)...)
	}
	return nil
}

// started drops how this QEMU came by its first state: a restored one gets its
// state from the checkpoint.
func (d *describer) started() {
	for i, o := range d.c.opts {
		switch o.Name {
		case "incoming":
			d.c.remove(i, "it arrived by migration")
		case "loadvm":
			d.c.remove(i, "it started from an internal snapshot")
		}
	}
}

// passwords notes those set through the monitor, which no argument holds.
func (d *describer) passwords(ctx context.Context) error {
	var vnc struct {
		Enabled bool   `json:"enabled"`
		Auth    string `json:"auth"`
	}
	if err := d.t.QMP.Execute(ctx, "query-vnc", nil, &vnc); err != nil && !qmp.IsCommandNotFound(err) {
		return fmt.Errorf("query-vnc: %w", err)
	}
	if vnc.Enabled && vnc.Auth == "vnc" {
		given := false
		for _, l := range d.c.named("vnc") {
			if _, ok := l.kv.Get("password-secret"); ok {
				given = true
			}
		}
		if !given {
			d.redact.secrets = append(d.redact.secrets, Secret{Option: "vnc", Key: "password", Prompt: "the VNC password (set through the monitor)"})
		}
	}
	return nil
}

// cpuModel asks how QEMU resolves the CPU model. An expansion is of the model
// named on the command line under the accelerator in use.
func (t *Target) cpuModel(ctx context.Context, cpus []VCPU) (CPUModel, error) {
	var m CPUModel
	for _, o := range t.Options {
		if o.Name == "cpu" {
			m.Argument = o.Value
		}
	}
	var err error
	if m.Type, err = qomGet[string](ctx, t.QMP, cpus[0].QOMPath, "type"); err != nil {
		return m, fmt.Errorf("vCPU type: %w", err)
	}
	if m.Features, err = ReadCPUFeatures(ctx, t.QMP, cpus[0].QOMPath); err != nil {
		return m, err
	}
	name := cpuType.ReplaceAllString(m.Type, "")
	m.Model, m.How = name, "argument"
	model := map[string]any{"name": name}
	if props := cpuProps(m.Argument); len(props) > 0 {
		model["props"] = props
	}
	for _, kind := range []string{"static", "full"} {
		var out struct {
			Model struct {
				Name  string         `json:"name"`
				Props map[string]any `json:"props"`
			} `json:"model"`
		}
		err := t.QMP.Execute(ctx, "query-cpu-model-expansion", map[string]any{"type": kind, "model": model}, &out)
		if _, refused := errors.AsType[*qmp.Error](err); refused {
			continue
		}
		if err != nil {
			return m, fmt.Errorf("query-cpu-model-expansion: %w", err)
		}
		m.Model, m.Props, m.How = out.Model.Name, out.Model.Props, kind
		return m, nil
	}
	return m, nil
}

// cpuProps reads "host,+avx,-sse4.1,pmu=off" as properties. A sign wins over an
// assignment, as in QEMU.
func cpuProps(arg string) map[string]any {
	props, signs := make(map[string]any), make(map[string]any)
	for i, f := range strings.Split(arg, ",") {
		key, val, assigned := strings.Cut(f, "=")
		switch {
		case i == 0 || f == "":
		case f[0] == '+' || f[0] == '-':
			signs[f[1:]] = f[0] == '+'
		case !assigned || val == "on":
			props[key] = true
		case val == "off":
			props[key] = false
		default:
			props[key] = val
		}
	}
	for k, v := range signs {
		props[k] = v
	}
	return props
}

var proxmoxID = regexp.MustCompile(`^/var/run/qemu-server/|^/run/qemu-server/`)

// Managers that are known by the marks they leave.
const (
	ManagerLibvirt = "libvirt"
	ManagerProxmox = "proxmox"
)

// manager says who started the VM, by marks its command line carries.
func (t *Target) manager() string { return managerOf(t.Options) }

func managerOf(opts []cmdline.Option) string {
	for _, o := range opts {
		switch {
		case o.Name == "object" && strings.Contains(o.Value, "/var/lib/libvirt/"),
			o.Name == "object" && strings.Contains(o.Value, "masterKey0"),
			o.Name == "chardev" && strings.Contains(o.Value, "charmonitor"):
			return ManagerLibvirt
		case o.Name == "pidfile" && proxmoxID.MatchString(o.Value):
			return ManagerProxmox
		}
	}
	return ""
}
