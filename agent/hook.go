package agent

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// Hooks are commands of the operator that run before and after each checkpoint,
// while the VM runs. They see what it is about in their environment:
// CKAGENT_HOOK (pre or post), CKAGENT_VM, CKAGENT_QEMU_PID; after it also
// CKAGENT_RESULT (ok or failed), CKAGENT_CHECKPOINT and CKAGENT_ERROR.
type Hooks struct {
	Pre, Post string        // for sh -c; "": none
	Timeout   time.Duration // of each
}

const (
	hookGrace  = time.Second // between SIGTERM and SIGKILL
	hookOutput = 1 << 10     // bytes of what a hook said that are kept, its last ones
)

// around runs take between the hooks. A pre-hook that fails refuses the checkpoint.
// The post-hook runs whatever happened once the other has begun, since it may have
// something to undo; that it failed is told beside the outcome.
func (h Hooks) around(ctx context.Context, v *VM, take func() (id string, err error)) (missed, err error) {
	base := []string{"CKAGENT_VM=" + v.Name, "CKAGENT_QEMU_PID=" + strconv.Itoa(v.pid)}
	id := ""
	if err = h.run(ctx, "pre", h.Pre, base); err != nil {
		if !problem.Is(err, problem.Cancelled) {
			err = problem.New(problem.Refused, "run pre-hook", "VM "+v.Name, "%w", err).
				WithHint("the VM was not touched: mend the hook, or what it checks")
		}
	} else {
		id, err = take()
	}
	result, what := "ok", ""
	if err != nil {
		result, what = "failed", strings.ReplaceAll(err.Error(), "\x00", " ")
	}
	// Not ended by what ended us: it may have to undo what the first one did.
	after := append(base, "CKAGENT_RESULT="+result, "CKAGENT_CHECKPOINT="+id, "CKAGENT_ERROR="+what)
	if e := h.run(context.WithoutCancel(ctx), "post", h.Post, after); e != nil {
		missed = problem.New(problem.Failed, "run post-hook", "VM "+v.Name, "%w", e)
	}
	if err != nil {
		return nil, errors.Join(err, missed)
	}
	return missed, nil
}

// run runs one hook to its end, or to its deadline, with whatever it has started.
func (h Hooks) run(ctx context.Context, which, command string, env []string) error {
	if command == "" {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, h.Timeout)
	defer cancel()
	cmd := exec.CommandContext(limited, "/bin/sh", "-c", command)
	cmd.Env = append(append(os.Environ(), env...), "CKAGENT_HOOK="+which)
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	group := func(sig unix.Signal) error { return unix.Kill(-cmd.Process.Pid, sig) }
	cmd.Cancel = func() error { return group(unix.SIGTERM) }
	cmd.WaitDelay = hookGrace
	err := cmd.Run()
	if cmd.Process != nil && limited.Err() != nil {
		_ = group(unix.SIGKILL) // whoever of it is left
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return problem.New(problem.Cancelled, "run "+which+"-hook", command, "%w", ctx.Err())
	case limited.Err() != nil:
		return problem.New(problem.Failed, "run "+which+"-hook", command, "it did not end within %v%s", h.Timeout, said.quoted())
	}
	return problem.New(problem.Failed, "run "+which+"-hook", command, "%w%s", err, said.quoted())
}

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - hookOutput; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func (t *tail) quoted() string {
	if s := strings.TrimSpace(string(t.b)); s != "" {
		return ": " + strings.ToValidUTF8(s, "?")
	}
	return ""
}
