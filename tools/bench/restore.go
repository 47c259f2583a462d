package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/tools/bench/report"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// restoreSpec is one guest that is restored again and again.
type restoreSpec struct {
	name    string
	guest   guestSpec
	percent int
	least   int
}

var restoreSpecs = []restoreSpec{
	{"1g", guestSpec{memoryMiB: 1024, usedMiB: 512, devices: 2}, 34, 3},
	{"3g", guestSpec{memoryMiB: 3072, usedMiB: 2048, devices: 2}, 17, 3},
}

// restoreReport is what is read of the answer of "ckagent restore --json".
type restoreReport struct {
	QEMUPID            int    `json:"qemu_pid"`
	QMP                string `json:"qmp"`
	ReadyNS            int64  `json:"ready_ns"`
	ResumeNS           int64  `json:"resume_ns"`
	CommandToRunningNS int64  `json:"command_to_running_ns"`
	DrainedNS          int64  `json:"drained_ns"`
	LazyBytes          uint64 `json:"lazy_bytes"`
	Faults             uint64 `json:"faults"`
	Phases             []struct {
		Name string `json:"name"`
		AtNS int64  `json:"at_ns"`
	} `json:"phases"`
}

// saved is a dead guest of which a checkpoint and a full migration exist.
type saved struct {
	g           *guest
	store, file string
	id          string
	stored      float64
}

// save takes both and kills the guest. Its directory stays until close.
func (b *bench) save(ctx context.Context, s guestSpec, dir string, full bool) (_ *saved, err error) {
	g, err := launch(ctx, s)
	if err != nil {
		return nil, err
	}
	v := &saved{g: g, store: filepath.Join(dir, "store"), file: filepath.Join(dir, "full")}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	out, _, _, err := b.command(ctx, "checkpoint", fmt.Sprint(g.PID()), "--store", v.store)
	if err != nil {
		return nil, err
	}
	var r checkpointReport
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("ckagent checkpoint: %q: %w", out, err)
	}
	v.id, v.stored = r.ID, float64(r.StoredBytes)
	if full {
		if _, err := g.stopped(ctx, func() (float64, error) { return g.migrate(ctx, v.file, false) }); err != nil {
			return nil, err
		}
	}
	return v, g.Crash()
}

// restoreOnce restores the checkpoint, waits until all of it is in and kills it.
func (b *bench) restoreOnce(ctx context.Context, v *saved) (r restoreReport, err error) {
	from := v.g.SerialSize()
	out, _, _, err := b.command(ctx, "restore", v.id, "--store", v.store)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return r, fmt.Errorf("ckagent restore: %q: %w", out, err)
	}
	vm, err := vmtest.Adopt(r.QEMUPID, r.QMP, v.g.SerialPath(), from)
	if err != nil {
		return r, err
	}
	defer vm.Kill()
	alive, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	report, err := vm.AwaitProgress(alive, 20)
	return r, errors.Join(err, report.Check())
}

// incomingOnce lets QEMU load the full migration: command to the RESUME event, and
// from its main loop's first answer.
func (v *saved) incomingOnce(ctx context.Context) (f figures, err error) {
	argv := v.g.Argv()
	monitor := v.g.ControlPath()
	_ = os.Remove(monitor)       // the dead guest's
	_ = os.Remove(v.g.QMPPath()) // both are made anew
	cmd := exec.Command(argv[0], append(argv[1:len(argv):len(argv)], "-incoming", "defer")...)
	cmd.Dir = v.g.Dir()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	state, err := os.Open(v.file)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		_ = cmd.Process.Kill() // ours, not waited for yet
		_ = cmd.Wait()
	}()
	c, err := dialWhenThere(ctx, monitor)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ready := time.Now()
	events := c.Subscribe(64, "RESUME", "MIGRATION")
	defer events.Close()
	caps := map[string]any{"capabilities": []map[string]any{{"capability": "events", "state": true}}}
	if err := c.Execute(ctx, "migrate-set-capabilities", caps, nil); err != nil {
		return nil, err
	}
	if err := c.ExecuteFD(ctx, "getfd", map[string]any{"fdname": "state"}, nil, state); err != nil {
		return nil, err
	}
	if err := c.Execute(ctx, "migrate-incoming", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return nil, err
	}
	within, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("the guest did not run within a minute"))
	defer cancel()
	for {
		select {
		case e, open := <-events.C():
			switch {
			case !open:
				return nil, fmt.Errorf("-incoming: %w", c.Err())
			case e.Name == "RESUME":
				return figures{"ready": float64(ready.Sub(begin)), "resume": float64(e.Timestamp.Sub(ready)),
					"running": float64(e.Timestamp.Sub(begin))}, nil
			case strings.Contains(string(e.Data), `"completed"`):
				// The state was taken of a stopped guest and says so.
				if err := c.Execute(ctx, "cont", nil, nil); err != nil {
					return nil, err
				}
			}
		case <-within.Done():
			return nil, fmt.Errorf("-incoming: %w", context.Cause(within))
		}
	}
}

// dialWhenThere connects as soon as a monitor answers.
func dialWhenThere(ctx context.Context, path string) (*qmp.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	ep, err := qmp.ParseEndpoint("unix:" + path)
	if err != nil {
		return nil, err
	}
	for {
		if _, err := os.Stat(path); err == nil {
			c, err := qmp.Dial(ctx, ep)
			if err == nil {
				return c, nil
			}
			if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) { // between bind and listen
				return nil, err
			}
		}
		if err := wait(ctx, time.Millisecond); err != nil {
			return nil, fmt.Errorf("monitor %s: %w", path, err)
		}
	}
}

func (b *bench) restores(ctx context.Context, s restoreSpec) error {
	dir, err := os.MkdirTemp(b.dir, "restore-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	v, err := b.save(ctx, s.guest, dir, true)
	if err != nil {
		return err
	}
	defer v.g.close()
	table := stageTable{title: "Restore: " + s.guest.String()}
	var ours, peer report.Figures
	for round := range b.rounds(s.percent, s.least) {
		r, err := b.restoreOnce(ctx, v)
		if err != nil {
			return err
		}
		noteRestore(&ours, r)
		table.add(round, phases(r))
		f, err := v.incomingOnce(ctx)
		if err != nil {
			return err
		}
		for name, x := range f {
			peer.Add(name, x)
		}
	}
	b.stages = append(b.stages, table)
	group := "Restore: " + s.guest.String()
	row := func(id, what, fig string, goal report.Goal) {
		b.row(report.Row{ID: "restore-" + s.name + "/" + id, Group: group, What: what, Ours: ours.Get(fig).Median(), Peer: peer.Get(fig).Median(),
			PeerName: "-incoming", N: len(ours.Get(fig)), Goal: goal})
	}
	row("running", "command to guest running", "running", report.Goal{})
	row("ready", "command to QEMU up", "ready", report.Goal{})
	row("resume", "QEMU up to guest running", "resume", report.Goal{Text: "≤ 15 ms", Value: 15e6})
	row("drained", "command to all memory in, let go", "drained", report.Goal{})
	b.row(report.Row{ID: "restore-" + s.name + "/drain", Group: group, What: "bytes with content brought in, running to let go", Unit: report.PerSecond,
		Ours: v.stored / (ours.Get("drained").Median() - ours.Get("running").Median()) * 1e9, Peer: math.NaN(), N: len(ours.Get("drained"))})
	return nil
}

func noteRestore(f *report.Figures, r restoreReport) {
	f.Add("ready", float64(r.ReadyNS))
	f.Add("resume", float64(r.ResumeNS))
	f.Add("running", float64(r.CommandToRunningNS))
	f.Add("drained", float64(r.DrainedNS))
	f.Add(fFaults, float64(r.Faults))
}

// phases are the steps of a restore, each as the time since the one before.
func phases(r restoreReport) (out []stage) {
	var last int64
	for _, p := range r.Phases {
		out = append(out, stage{"to " + p.Name, float64(p.AtNS - last)})
		last = p.AtNS
	}
	return append(out, stage{"whole, drained", float64(r.DrainedNS)})
}

// flatResume shows that the resume does not follow the size of the RAM.
func (b *bench) flatResume(ctx context.Context) error {
	sizes := []int{256, 1024, 4096, 8192}
	if b.Quick {
		sizes = sizes[:2]
	}
	dir, err := os.MkdirTemp(b.dir, "resume-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	all := make([]*saved, len(sizes))
	defer func() {
		for _, v := range all {
			if v != nil {
				v.g.close()
			}
		}
	}()
	for i, mem := range sizes {
		sub := filepath.Join(dir, fmt.Sprint(mem))
		if err := os.Mkdir(sub, 0o700); err != nil {
			return err
		}
		if all[i], err = b.save(ctx, guestSpec{memoryMiB: mem, usedMiB: 64, devices: 2, idle: true}, sub, false); err != nil {
			return err
		}
	}
	fs := make([]report.Figures, len(sizes))
	for range b.rounds(34, 3) {
		for i, v := range all {
			r, err := b.restoreOnce(ctx, v)
			if err != nil {
				return fmt.Errorf("%d MiB: %w", sizes[i], err)
			}
			noteRestore(&fs[i], r)
		}
	}
	var line [2][]report.Point
	for i, mem := range sizes {
		group := "Resume of a lazy restore by RAM size (64 MiB used)"
		resume, running := fs[i].Get("resume"), fs[i].Get("running")
		base := fs[0].Get("resume").Median()
		b.row(report.Row{ID: fmt.Sprintf("resume/%d", mem), Group: group, What: mib(mem) + ": QEMU up to guest running", Ours: resume.Median(),
			Peer: base, PeerName: "the smallest", N: len(resume), Goal: report.Goal{Text: "≤ 15 ms, flat (≤ 1.5x the smallest)", Value: 15e6, Ratio: 1.5}})
		b.row(report.Row{ID: fmt.Sprintf("resume-ready/%d", mem), Group: group, What: mib(mem) + ": command to QEMU up", Ours: fs[i].Get("ready").Median(), Peer: math.NaN(), N: len(resume)})
		b.row(report.Row{ID: fmt.Sprintf("resume-running/%d", mem), Group: group, What: mib(mem) + ": command to guest running", Ours: running.Median(), Peer: math.NaN(), N: len(running)})
		line[0] = append(line[0], report.Point{X: float64(mem), Y: resume.Median() / 1e6})
		line[1] = append(line[1], report.Point{X: float64(mem), Y: running.Median() / 1e6})
	}
	b.out.Charts["resume.svg"] = report.Chart{Title: "Lazy restore by RAM size", XLabel: "RAM (MiB)", YLabel: "ms",
		Series: []report.Series{{Name: "QEMU up to guest running", Points: line[0]}, {Name: "command to guest running", Points: line[1]}}}
	return nil
}
