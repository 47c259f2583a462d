package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

var _ Monitor = (*qmp.Client)(nil)

// Target is a running VM with its monitor. Close gives the monitor back.
type Target struct {
	Process  *Process
	QMP      *qmp.Client
	Endpoint qmp.Endpoint
	Version  qmp.Version

	Name    string // QEMU's -name, or "" without one
	UUID    string
	Machine string // versioned machine type: pc-i440fx-7.2
	Accel   string // kvm, tcg, or what the command line says
	VCPUs   []VCPU // at the time of Open
	Options []cmdline.Option

	Blocks []RAMBlock // filled by Layout; nil before

	// LeaveDisksOut is set by who wants checkpoints without disks: then Refusals
	// does not judge them.
	LeaveDisksOut bool
	// Overlays is set by who switches disks to overlays: then encrypted images can be
	// copied as they lie, since nobody writes to them meanwhile.
	Overlays bool

	// fresh says that the mappings in Blocks were read by the Layout just before: the
	// next look at their flags may spare the kernel another walk of every page table.
	fresh bool
}

// Options say how to open a target.
type Options struct {
	QMP string // address of the monitor; empty: found by looking at the process
}

// VCPU is a virtual CPU and its thread on the host.
type VCPU struct {
	Index   int    `json:"index"`
	TID     int    `json:"tid"` // in our pid namespace
	QOMPath string `json:"qom_path"`
}

// Open takes hold of the QEMU process pid and its monitor, and asks who it is.
// Errors: problem.NotFound (no such process), problem.Refused (not QEMU, no
// monitor, the monitor is another VM's), problem.Busy (the monitor is in use).
func Open(ctx context.Context, pid int, o Options) (*Target, error) {
	p, err := OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	t, err := openTarget(ctx, p, o)
	if err != nil {
		if gone := p.Check(); gone != nil {
			err = gone
		}
		p.Close()
		return nil, err
	}
	return t, nil
}

func openTarget(ctx context.Context, p *Process, o Options) (*Target, error) {
	t := &Target{Process: p}
	var err error
	if len(p.Argv) > 1 {
		if t.Options, err = cmdline.Parse(p.Argv[1:]); err != nil {
			return nil, problem.New(problem.Refused, "read command line", p.String(), "%w", err)
		}
	}
	if t.QMP, t.Endpoint, err = Connect(ctx, p, o); err != nil {
		return nil, err
	}
	if err := t.identify(ctx); err != nil {
		t.QMP.Close()
		return nil, err
	}
	return t, nil
}

// Connect finds and opens a process's monitor. Of several endpoints the first that
// answers is taken: a busy one is only reported when no other is free.
func Connect(ctx context.Context, p *Process, o Options) (*qmp.Client, qmp.Endpoint, error) {
	var ends []qmp.Endpoint
	if o.QMP != "" {
		e, err := qmp.ParseEndpoint(o.QMP)
		if err != nil {
			return nil, qmp.Endpoint{}, err
		}
		ends = []qmp.Endpoint{e}
	} else {
		var err error
		if ends, err = qmp.Discover(ctx, p.PID); err != nil {
			return nil, qmp.Endpoint{}, err
		}
	}
	if len(ends) == 0 {
		return nil, qmp.Endpoint{}, problem.New(problem.Refused, "find monitor", p.String(), "it has no QMP socket").
			WithHint("start QEMU with -qmp unix:PATH,server=on,wait=off, or name the socket with --qmp")
	}
	var first error
	for _, e := range ends {
		c, err := qmp.Dial(ctx, e)
		if err == nil {
			return c, e, nil
		}
		if first == nil || problem.Is(err, problem.Busy) && !problem.Is(first, problem.Busy) {
			first = err
		}
	}
	return nil, qmp.Endpoint{}, first
}

// identify asks the monitor who it is and proves that it is this process's.
func (t *Target) identify(ctx context.Context) error {
	q, op := t.QMP, "identify"
	wrap := func(what string, err error) error {
		return problem.New(problem.CodeOf(err), op, t.Process.String(), "%s: %w", what, err)
	}
	t.Version = q.Version()
	var err error
	if t.VCPUs, err = t.ReadVCPUs(ctx); err != nil {
		return err
	}
	var name struct {
		Name string `json:"name"`
	}
	if err = q.Execute(ctx, "query-name", nil, &name); err != nil {
		return wrap("query-name", err)
	}
	t.Name = name.Name
	var id struct{ UUID string }
	if err = q.Execute(ctx, "query-uuid", nil, &id); err != nil {
		return wrap("query-uuid", err)
	}
	t.UUID = id.UUID
	if t.Machine, err = qomGet[string](ctx, q, "/machine", "type"); err != nil {
		return wrap("machine type", err)
	}
	t.Machine = strings.TrimSuffix(t.Machine, "-machine")
	if t.Accel, err = t.accelerator(ctx); err != nil {
		return wrap("accelerator", err)
	}
	return nil
}

// accelerator tells which one runs the vCPUs. QMP answers for KVM only; what else it
// may be says the command line. Only if that leaves a choice QEMU is asked for its
// translation buffer, which TCG alone has: the answer takes a walk over all of the
// buffer, 5 ms in which no vCPU may touch a device.
func (t *Target) accelerator(ctx context.Context) (string, error) {
	var kvm struct {
		Enabled bool `json:"enabled"`
	}
	if err := t.QMP.Execute(ctx, "query-kvm", nil, &kvm); err != nil {
		return "", err
	}
	if kvm.Enabled {
		return "kvm", nil
	}
	others := accelerators(t.Options)
	switch len(others) {
	case 0:
		return "tcg", nil // QEMU's own choice where KVM is not
	case 1:
		return others[0], nil
	}
	text, err := t.QMP.HMP(ctx, "info jit")
	if err != nil {
		return "", err
	}
	if strings.Contains(text, "Translation buffer state") {
		return "tcg", nil
	}
	return others[0], nil
}

// accelerators are those but KVM that a command line allows, in its order of
// preference.
func accelerators(opts []cmdline.Option) (names []string) {
	for _, o := range opts {
		if o.Name != "accel" && o.Name != "machine" && o.Name != "M" {
			continue
		}
		kv, err := o.KeyVal()
		if err != nil {
			continue
		}
		list, _ := kv.Get("accel")
		for name := range strings.SplitSeq(list, ":") {
			if name != "" && name != "kvm" && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// ReadVCPUs asks for the vCPUs and where they run. Thread ids are as QEMU sees
// them; that every one of them is a thread of this process is the proof that the
// monitor is this process's and not another VM's.
func (t *Target) ReadVCPUs(ctx context.Context) ([]VCPU, error) {
	var cpus []struct {
		Index    int    `json:"cpu-index"`
		ThreadID int    `json:"thread-id"`
		QOMPath  string `json:"qom-path"`
	}
	if err := t.QMP.Execute(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return nil, problem.New(problem.CodeOf(err), "list vCPUs", t.Process.String(), "%w", err)
	}
	host, err := t.Process.threadsByInnerID()
	if err != nil {
		return nil, errors.Join(t.Process.ending(), fmt.Errorf("threads of %s: %w", t.Process, err))
	}
	out := make([]VCPU, 0, len(cpus))
	for _, c := range cpus {
		tid, ok := host[c.ThreadID]
		if !ok {
			if gone := t.Process.ending(); gone != nil {
				return nil, gone // its threads went first
			}
			return nil, problem.New(problem.Refused, "identify", t.Process.String(),
				"the monitor belongs to another process: its vCPU %d is thread %d", c.Index, c.ThreadID).
				WithHint("the address given with --qmp is another VM's")
		}
		out = append(out, VCPU{Index: c.Index, TID: tid, QOMPath: c.QOMPath})
	}
	if len(out) == 0 {
		return nil, problem.New(problem.Refused, "identify", t.Process.String(), "the machine has no vCPU")
	}
	return out, nil
}

// threadsByInnerID maps thread ids as the process sees them (its own pid
// namespace) to ours.
func (p *Process) threadsByInnerID() (map[int]int, error) {
	tids, err := p.Threads()
	if err != nil {
		return nil, err
	}
	out := make(map[int]int, len(tids))
	for _, tid := range tids {
		raw, err := readBounded(p.Path("task/"+strconv.Itoa(tid)+"/status"), 1<<20)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) || p.Alive() {
				continue // the thread ended meanwhile
			}
			return nil, err
		}
		inner := tid
		for line := range strings.Lines(string(raw)) {
			if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
				if f := strings.Fields(ids); len(f) > 0 {
					if n, err := strconv.Atoi(f[len(f)-1]); err == nil {
						inner = n
					}
				}
			}
		}
		out[inner] = tid
	}
	return out, nil
}

// Layout resolves the RAM blocks the long way and remembers them in Blocks. The
// first Refusals after it judges the mappings as they were read here.
func (t *Target) Layout(ctx context.Context) ([]RAMBlock, error) {
	blocks, err := ResolveLayout(ctx, t.Process, t.QMP, nil)
	if err != nil {
		return nil, err
	}
	if err := t.markReported(ctx, blocks); err != nil {
		return nil, problem.New(problem.CodeOf(err), "look at the balloon", t.Process.String(), "%w", err)
	}
	t.Blocks, t.fresh = blocks, true
	return blocks, nil
}

// Close gives the monitor back and lets go of the process.
func (t *Target) Close() error { return errors.Join(t.QMP.Close(), t.Process.Close()) }

// qomGet reads a property of QEMU's object tree.
func qomGet[T any](ctx context.Context, q Monitor, path, property string) (T, error) {
	var v T
	err := q.Execute(ctx, "qom-get", map[string]string{"path": path, "property": property}, &v)
	return v, err
}

// qomChild is a property as qom-list shows it.
type qomChild struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// object returns the type of a child object: "child<virtio-net-pci>".
func (c qomChild) object() (typ string, ok bool) {
	t, ok := strings.CutPrefix(c.Type, "child<")
	return strings.TrimSuffix(t, ">"), ok
}

func qomList(ctx context.Context, q Monitor, path string) ([]qomChild, error) {
	var out []qomChild
	err := q.Execute(ctx, "qom-list", map[string]string{"path": path}, &out)
	return out, err
}
