package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
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
	childGrace     = 20 * time.Second // for a restore that is interrupted to undo what it did
)

// child runs a verb of ckagent with --json and decodes the object it prints. What it
// starts on purpose, such as a restored QEMU, is in a session and control groups of its
// own and outlives it and us.
func (d *Daemon) child(ctx context.Context, log *slog.Logger, out any, args ...string) error {
	argv := append(append([]string{}, selfexe.Or(d.deps.Self)...), append(args, "--json")...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var said, complained bytes.Buffer
	cmd.Stdout, cmd.Stderr = &bounded{b: &said}, &bounded{b: &complained}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = childGrace
	err := cmd.Run()
	if complained.Len() > 0 {
		log.Info("a child says", "verb", args[0], "text", complained.String())
	}
	var head struct {
		Error *struct {
			Code    problem.Code `json:"code"`
			Op      string       `json:"op"`
			Message string       `json:"message"`
			Hint    string       `json:"hint"`
		} `json:"error"`
	}
	if jerr := json.Unmarshal(said.Bytes(), &head); jerr != nil {
		return errors.Join(err, fmt.Errorf("ckagent %s: %w", args[0], jerr))
	}
	if e := head.Error; e != nil {
		return problem.New(e.Code, args[0], "", "%s", e.Message)
	}
	if err != nil {
		return fmt.Errorf("ckagent %s: %w", args[0], err)
	}
	return json.Unmarshal(said.Bytes(), out)
}

// bounded keeps the beginning of what is written to it.
type bounded struct{ b *bytes.Buffer }

func (w *bounded) Write(p []byte) (int, error) {
	w.b.Write(p[:min(len(p), max(0, maxChildOutput-w.b.Len()))])
	return len(p), nil
}

// restore brings a VM's newest checkpoint back.
func (d *Daemon) restore(ctx context.Context, log *slog.Logger, vm, store string) (pid int, err error) {
	var r struct {
		QEMUPID int `json:"qemu_pid"`
	}
	if err := d.child(ctx, log, &r, "restore", vm, "--store", store, "--detach"); err != nil {
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
	err := d.child(ctx, log, &r, "rehearse", vm, "--store", store, "--for", time.Duration(d.cfg.Rehearsal.For).String())
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
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// The schedule goes on where the daemon before this one left it.
		next := time.NewTimer(max(0, time.Until(time.Unix(0, r.Rehearsal.GetAtNs()).Add(every))))
		if r.Rehearsal == nil {
			next.Reset(every)
		}
		defer next.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-next.C:
			}
			// It takes a turn like a checkpoint: both read and write the store.
			if w.d.limits.turns.Acquire(ctx, 1) != nil {
				return
			}
			result := w.d.rehearse(ctx, log, w.name, r.Spec.GetStore())
			w.d.limits.turns.Release(1)
			if ctx.Err() != nil {
				return
			}
			log.Info("rehearsed", "ok", result.GetOk(), "id", result.GetId(), "running", time.Duration(result.GetRunningNs()), "error", result.GetError())
			w.note(log, func(r *Record) { r.Rehearsal = result })
			next.Reset(every)
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}
