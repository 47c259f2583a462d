package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
)

// Names of the ways to keep a VM's state.
const (
	wayOurs       = "ckagent"              // the engine it takes by itself
	wayUffd       = "ckagent, engine uffd" // or the one that works everywhere
	waySnapshot   = "background-snapshot"
	wayStopCopy   = "stop-and-copy"
	wayDeviceOnly = "device state"
)

// stage is a step of an operation and how long it took, in nanoseconds.
type stage struct {
	name string
	ns   float64
}

// checkpointReport is what is read of the answer of "ckagent checkpoint --json".
type checkpointReport struct {
	ID            string   `json:"id"`
	Mode          string   `json:"mode"`
	Engine        string   `json:"engine"`
	PauseNS       int64    `json:"pause_ns"`
	ArmNS         int64    `json:"arm_ns"`
	DeviceStateNS int64    `json:"device_state_ns"`
	TotalNS       int64    `json:"total_ns"`
	StopNS        int64    `json:"stop_ns"`
	ContNS        int64    `json:"cont_ns"`
	PrearmNS      int64    `json:"prearm_ns"`
	ScanNS        int64    `json:"scan_ns"`
	ReleaseNS     int64    `json:"release_ns"`
	StoredBytes   uint64   `json:"stored_bytes"`
	Faults        uint64   `json:"faults"`
	Retaken       []string `json:"retaken"`
	FaultP50NS    int64    `json:"fault_p50_ns"`
	FaultP99NS    int64    `json:"fault_p99_ns"`
}

// ckagent takes a checkpoint by the program, from nothing to its exit: a full one that
// nobody is going to continue, as the peers' are.
func (b *bench) ckagent(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
	return b.checkpoint(ctx, g, dir, "--full-every", "1")
}

// uffd is ckagent with the synchronous engine.
func (b *bench) uffd(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
	return b.checkpoint(ctx, g, dir, "--full-every", "1", "--engine", "uffd")
}

// checkpoint is ckagent with more arguments.
func (b *bench) checkpoint(ctx context.Context, g *guest, dir string, args ...string) (figures, []stage, error) {
	began := time.Now()
	out, marks, cpu, err := b.command(ctx, append([]string{"checkpoint", fmt.Sprint(g.PID()), "--store", dir, "--mode", "cow"}, args...)...)
	ended := time.Now()
	if err != nil {
		return nil, nil, err
	}
	var r checkpointReport
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, nil, fmt.Errorf("ckagent checkpoint: %q: %w", out, err)
	}
	if r.Mode != "cow" || len(r.Retaken) > 0 {
		b.out.Notes = append(b.out.Notes, fmt.Sprintf("a checkpoint was taken again, in the end in mode %s: %s", r.Mode, strings.Join(r.Retaken, "; ")))
		b.Log("%s", b.out.Notes[len(b.out.Notes)-1])
	}
	f := figures{
		fDevice: float64(r.DeviceStateNS), fBytes: float64(r.StoredBytes), fCPU: cpu.Seconds(), fOwnPause: float64(r.PauseNS),
		fFaults: float64(r.Faults),
	}
	if r.Faults > 0 && r.Engine == "uffd" {
		f[fFaultP50], f[fFaultP99] = float64(r.FaultP50NS), float64(r.FaultP99NS)
	}
	rest := float64(r.PauseNS - r.DeviceStateNS - r.ArmNS)
	stages := []stage{
		{"pause: device state saved", float64(r.DeviceStateNS)},
		{"pause: re-arm (freeze)", float64(r.ArmNS)},
		{"pause: the rest (ways to and from QEMU and the fault server, cont)", max(0, rest)},
		{"stop sent to STOP", float64(r.StopNS)},
		{"cont sent to its reply", float64(r.ContNS)},
		{"pre-arm (guest runs)", float64(r.PrearmNS)},
		{"scan, everything captured", float64(r.ScanNS)},
		{"release, huge pages made whole", float64(r.ReleaseNS)},
	}
	if prearm, resume, commit := marks["prearm"], marks["resume"], marks["commit"]; !prearm.IsZero() && !resume.IsZero() && !commit.IsZero() {
		f[fSpeed] = float64(r.StoredBytes) / commit.Sub(resume).Seconds()
		f[fDurable] = float64(r.StoredBytes) / ended.Sub(resume).Seconds()
		stages = append(stages,
			stage{"command to pre-armed: start, attach, layout, helpers", float64(prearm.Sub(began))},
			stage{"pre-armed to running again: flush, pause", float64(resume.Sub(prearm))},
			stage{"running again to all pages written", float64(commit.Sub(resume))},
			stage{"fsync, commit, helpers ended, exit", float64(ended.Sub(commit))})
	}
	return f, append(stages, stage{"whole command", float64(ended.Sub(began))}), nil
}

var stepLine = regexp.MustCompile(`level=DEBUG msg=(\w+) `)

// command runs ckagent verbosely and returns its answer, when it reported which
// step, and the processor time it and its helpers used.
func (b *bench) command(ctx context.Context, args ...string) (out []byte, marks map[string]time.Time, cpu time.Duration, err error) {
	cmd := exec.CommandContext(ctx, b.Binary, append(args, "--json", "-v")...)
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, nil, 0, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, 0, err
	}
	marks = map[string]time.Time{}
	var said []string
	for s := bufio.NewScanner(stderr); s.Scan(); {
		if m := stepLine.FindStringSubmatch(s.Text()); m != nil {
			marks[m[1]] = time.Now()
		}
		said = append(said, s.Text())
	}
	if err := cmd.Wait(); err != nil {
		return nil, nil, 0, fmt.Errorf("ckagent %s: %w: %s%s", strings.Join(args, " "), err, stdout.Bytes(), strings.Join(said, "\n"))
	}
	return stdout.Bytes(), marks, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// migrate lets QEMU write its state to a file by the quickest way it has: its own
// writes to a descriptor, at full speed. Commands that come before it are sent along.
func (g *guest) migrate(ctx context.Context, path string, background bool, before ...*qmp.Request) (bytes float64, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	caps := map[string]any{"capabilities": []capability{{"background-snapshot", background}, {"events", true}}}
	if err := g.q.Execute(ctx, "migrate-set-capabilities", caps, nil); err != nil {
		return 0, err
	}
	if err := g.q.Execute(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 50}, nil); err != nil {
		return 0, err
	}
	if err := g.q.ExecuteFD(ctx, "getfd", map[string]any{"fdname": "bench"}, nil, f); err != nil {
		return 0, err
	}
	begin, err := qmp.Encode("migrate", map[string]any{"uri": "fd:bench"})
	if err != nil {
		return 0, err
	}
	calls, err := g.q.Send(append(before, begin)...)
	if err != nil {
		return 0, err
	}
	for _, c := range calls {
		if err := c.Wait(ctx, nil); err != nil {
			return 0, err
		}
	}
	for {
		var info struct {
			Status string `json:"status"`
			Desc   string `json:"error-desc"`
		}
		if err := g.q.Execute(ctx, "query-migrate", nil, &info); err != nil {
			return 0, err
		}
		switch info.Status {
		case "completed":
			st, err := f.Stat()
			if err != nil {
				return 0, err
			}
			return float64(st.Size()), g.finalized(ctx)
		case "failed", "cancelled":
			return 0, fmt.Errorf("migrate: %s %s", info.Status, info.Desc)
		}
		if err := wait(ctx, 2*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

// finalized waits until QEMU has put a migration behind it: "completed" is said a
// moment before "cont" is allowed again.
func (g *guest) finalized(ctx context.Context) error {
	for {
		var s struct {
			Status string `json:"status"`
		}
		if err := g.q.Execute(ctx, "query-status", nil, &s); err != nil || s.Status != "finish-migrate" {
			return err
		}
		if err := wait(ctx, time.Millisecond); err != nil {
			return err
		}
	}
}

// backgroundSnapshot is QEMU's own copy-on-write snapshot.
func (b *bench) backgroundSnapshot(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
	n, err := g.migrate(ctx, filepath.Join(dir, "snapshot"), true)
	if err != nil {
		return nil, nil, err
	}
	return figures{fBytes: n}, nil, nil
}

// stopAndCopy stops the guest and migrates it to a file.
func (b *bench) stopAndCopy(ctx context.Context, g *guest, dir string) (_ figures, _ []stage, err error) {
	n, err := g.stopped(ctx, func() (float64, error) { return g.migrate(ctx, filepath.Join(dir, "full"), false) })
	if err != nil {
		return nil, nil, err
	}
	return figures{fBytes: n}, nil, nil
}

// deviceState saves the device state alone: what no way can do without.
func (b *bench) deviceState(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
	ns, err := g.stopped(ctx, func() (float64, error) {
		begin := time.Now()
		err := g.q.Execute(ctx, "xen-save-devices-state", map[string]any{"filename": filepath.Join(dir, "devices"), "live": false}, nil)
		return float64(time.Since(begin)), err
	})
	if err != nil {
		return nil, nil, err
	}
	return figures{fDevice: ns}, nil, nil
}

// stopped does something while the guest stands still.
func (g *guest) stopped(ctx context.Context, do func() (float64, error)) (v float64, err error) {
	if err := g.q.Execute(ctx, "stop", nil, nil); err != nil {
		return 0, err
	}
	v, err = do()
	return v, errors.Join(err, g.q.Execute(ctx, "cont", nil, nil))
}
