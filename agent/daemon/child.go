package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/selfexe"
)

const (
	maxChildOutput = 1 << 20
	restoreGrace   = 20 * time.Second // for one that is interrupted to undo what it did
)

// errand is a verb of ckagent that a child runs.
type errand struct {
	args  []string
	files []*os.File    // that it inherits, from descriptor 3 on
	grace time.Duration // what it has to end by itself when it is interrupted
}

// run has a verb run with --json and decodes the object it prints. What it starts on
// purpose, such as a restored QEMU, is in a session and control groups of its own and
// outlives it and us.
func (d *Daemon) run(ctx context.Context, log *slog.Logger, out any, e errand) error {
	argv := append(append([]string{}, selfexe.Or(d.deps.Self)...), append(e.args, "--json")...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.ExtraFiles = e.files
	if len(e.files) > 0 { // it is to end with us: its standard input does
		held, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		defer held.Close()
	}
	var said, complained bytes.Buffer
	cmd.Stdout, cmd.Stderr = &bounded{b: &said}, &bounded{b: &complained}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = e.grace
	err := cmd.Run()
	if complained.Len() > 0 {
		log.Info("a child says", "verb", e.args[0], "text", complained.String())
	}
	verb := e.args[0]
	var head struct {
		Error *struct {
			Code    problem.Code `json:"code"`
			Message string       `json:"message"`
		} `json:"error"`
	}
	if jerr := json.Unmarshal(said.Bytes(), &head); jerr != nil {
		return errors.Join(err, fmt.Errorf("ckagent %s: %w", verb, jerr))
	}
	if e := head.Error; e != nil {
		return problem.New(e.Code, verb, "", "%s", e.Message)
	}
	if err != nil {
		return fmt.Errorf("ckagent %s: %w", verb, err)
	}
	return json.Unmarshal(said.Bytes(), out)
}

// bounded keeps the beginning of what is written to it.
type bounded struct{ b *bytes.Buffer }

func (w *bounded) Write(p []byte) (int, error) {
	w.b.Write(p[:min(len(p), max(0, maxChildOutput-w.b.Len()))])
	return len(p), nil
}

// byName refers to a VM and to nothing else: a name alone, of a VM that has no checkpoint
// yet, might be the beginning of the id of another's, and one with a dash an option.
func byName(vm string) string { return "vm:" + vm }

// restore brings a VM's newest checkpoint back.
func (d *Daemon) restore(ctx context.Context, log *slog.Logger, vm, store string) (pid int, err error) {
	var r struct {
		QEMUPID int `json:"qemu_pid"`
	}
	if err := d.run(ctx, log, &r, errand{args: []string{"restore", byName(vm), "--store", store, "--detach"}, grace: restoreGrace}); err != nil {
		return 0, err
	}
	return r.QEMUPID, nil
}

// rehearse restores a VM's newest checkpoint apart from everything, and looks whether it
// runs.
func (d *Daemon) rehearse(ctx context.Context, log *slog.Logger, vm, store string) *apipb.Rehearsal {
	out := &apipb.Rehearsal{AtNs: time.Now().UnixNano()}
	var r struct {
		ID        string `json:"id"`
		RunningNS int64  `json:"command_to_running_ns"`
	}
	err := d.run(ctx, log, &r, errand{grace: restoreGrace,
		args: []string{"rehearse", byName(vm), "--store", store, "--for", time.Duration(d.cfg.Rehearsal.For).String()}})
	out.Id, out.RunningNs, out.Ok = r.ID, r.RunningNS, err == nil
	if err != nil {
		out.Error = err.Error()
	}
	return out
}

// rehearseOnSchedule rehearses as often as the VM's record says, until stop is called.
func (w *ward) rehearseOnSchedule(ctx context.Context, log *slog.Logger) (stop func()) {
	r := w.record()
	every := time.Duration(r.Spec.GetRehearseEveryNs())
	if every == 0 {
		return func() {}
	}
	first := every
	if r.Rehearsal != nil { // the schedule goes on where the daemon before this one left it
		// Not later than one interval, should the clock have been set back since.
		first = min(every, max(0, time.Until(time.Unix(0, r.Rehearsal.GetAtNs()).Add(every))))
	}
	// It takes a turn like a checkpoint: both read and write the store.
	return onSchedule(ctx, first, w.d.limits.turns, func(ctx context.Context) time.Duration {
		result := w.d.rehearse(ctx, log, w.name, r.Spec.GetStore())
		if ctx.Err() != nil {
			return every
		}
		log.Info("rehearsed", "ok", result.GetOk(), "id", result.GetId(), "running", time.Duration(result.GetRunningNs()), "error", result.GetError())
		w.note(log, func(r *Record) { r.Rehearsal = result })
		return every
	})
}
