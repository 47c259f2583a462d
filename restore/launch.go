package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/restore/plan"
)

// logName is where QEMU's messages go, in the run directory.
const logName = "qemu.log"

// qmpFD is the descriptor under which QEMU inherits its control socket.
const qmpFD = "3"

// qemu is a QEMU that is being restored: a child until it is let go.
type qemu struct {
	child   *os.Process
	started uint64        // start time of the child in ticks
	proc    *vm.Process   // of the child, from the greeting on
	conn    *net.UnixConn // to its control socket; QEMU greets when it gets there
	log     string
	machine string // the type it is started as
}

// launch starts QEMU from a plan.
func launch(ctx context.Context, p *plan.Plan) (_ *qemu, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	for _, c := range p.Copies {
		if err := copyFile(c.From, c.To, p.UID, p.GID); err != nil {
			return nil, problem.New(problem.Failed, "copy", c.From, "%w", err)
		}
	}
	listener, err := listen(p.QMPPath, p)
	if err != nil {
		return nil, err
	}
	// Our copy must not outlive QEMU's: its death then ends the connection.
	defer listener.Close()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: p.QMPPath, Net: "unix"})
	if err != nil {
		return nil, problem.New(problem.Failed, "connect", p.QMPPath, "%w", err)
	}
	q := &qemu{conn: conn, log: filepath.Join(p.RunDir, logName), machine: p.Machine}
	defer func() {
		if err != nil {
			q.kill()
		}
	}()
	out, err := os.OpenFile(q.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, problem.New(problem.Failed, "open", q.log, "%w", err)
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, problem.New(problem.Failed, "open", os.DevNull, "%w", err)
	}
	defer null.Close()
	sock, err := listener.File()
	if err != nil {
		return nil, problem.New(problem.Failed, "listen", p.QMPPath, "%w", err)
	}
	defer sock.Close()

	argv := []string{p.Binary}
	for _, a := range p.Args {
		argv = append(argv, strings.ReplaceAll(a, plan.QMPFD, qmpFD))
	}
	dir := p.Cwd
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		dir = "/"
	}
	q.child, err = os.StartProcess(p.Binary, argv, &os.ProcAttr{
		Dir: dir, Env: environ(p), Files: []*os.File{null, out, out, sock},
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: credential(p)},
	})
	if err != nil {
		return nil, problem.New(problem.Failed, "start", p.Binary, "%w", err)
	}
	q.started, err = startTicks(q.child.Pid)
	if err != nil {
		return nil, q.failed(ctx, "start", err)
	}
	return q, nil
}

// environ is what QEMU gets.
func environ(p *plan.Plan) []string {
	env := append(slices.Clone(p.Env), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	for _, name := range []string{"LD_LIBRARY_PATH", "QEMU_MODULE_DIR"} {
		// What decides about code comes from the operator, never from a manifest.
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// identify opens the process once it greets: what was started may be a wrapper
// that becomes QEMU only then.
func (q *qemu) identify() (err error) {
	q.proc, err = vm.OpenProcessAs(q.child.Pid, q.started)
	return err
}

// credential is whom QEMU runs as; nil for ourselves. A QEMU that drops its rights
// by itself needs them at the start.
func credential(p *plan.Plan) *syscall.Credential {
	if os.Geteuid() != 0 || p.UID == 0 && p.GID == 0 {
		return nil
	}
	for i, a := range p.Args {
		if a == "-runas" || a == "-run-with" && i+1 < len(p.Args) && strings.Contains(p.Args[i+1], "user=") {
			return nil
		}
	}
	c := &syscall.Credential{Uid: uint32(p.UID), Gid: uint32(p.GID)}
	for _, g := range p.Groups {
		c.Groups = append(c.Groups, uint32(g))
	}
	return c
}

// listen binds the control socket.
func listen(path string, p *plan.Plan) (*net.UnixListener, error) {
	const limit = 107 // sun_path, with its terminator
	if len(path) > limit {
		return nil, problem.New(problem.Usage, "listen", path, "the path has %d bytes, %d at most", len(path), limit).
			WithHint("give a shorter one: --qmp PATH")
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, problem.New(problem.Refused, "listen", path, "there is something that is no socket").WithHint("give another path: --qmp PATH")
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, problem.New(problem.Refused, "listen", path, "%w", errInUse).WithHint("give another path: --qmp PATH")
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, problem.New(problem.Failed, "listen", path, "%w", err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, problem.New(problem.Failed, "listen", path, "%w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(path, 0o600)
	if err == nil && os.Geteuid() == 0 {
		err = os.Chown(path, p.UID, p.GID)
	}
	if err != nil {
		l.Close()
		_ = os.Remove(path)
		return nil, problem.New(problem.Failed, "listen", path, "%w", err)
	}
	return l, nil
}

// awaitGreeting returns when there is something to read on the connection, without
// reading it.
func (q *qemu) awaitGreeting(ctx context.Context) error {
	raw, err := q.conn.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = q.conn.SetReadDeadline(unixEpoch) })
	defer stop()
	var n int
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		n, _, rerr = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(rerr, unix.EAGAIN) && !errors.Is(rerr, unix.EINTR)
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	case rerr != nil:
		return rerr
	case n == 0:
		return io.EOF
	}
	return nil
}

// failed turns an error into one that says what QEMU had to say; op is what was
// under way. When QEMU is on its way out, its last words are waited for.
func (q *qemu) failed(ctx context.Context, op string, err error) error {
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), errTooSlow) {
		return problem.New(problem.CodeOf(ctx.Err()), op, q.object(), "%w", ctx.Err())
	}
	said := q.lastWords()
	if errors.Is(context.Cause(ctx), errTooSlow) {
		err = context.Cause(ctx)
	}
	if said == "" {
		return problem.New(problem.Failed, op, q.object(), "%w", err)
	}
	if strings.Contains(said, "unsupported machine type") {
		return problem.New(problem.Refused, op, q.object(), "this QEMU does not know the machine type %s: %w", q.machine, err).
			WithHint("give one that does with --qemu PATH; PATH -machine help lists its types")
	}
	return problem.New(problem.Failed, op, q.object(), "QEMU says: %s: %w", said, err).
		WithHint("restore --dry-run shows the command line")
}

func (q *qemu) object() string {
	if q.child == nil {
		return "QEMU"
	}
	return fmt.Sprintf("QEMU (pid %d)", q.child.Pid)
}

// lastWords are the last lines of QEMU's log.
func (q *qemu) lastWords() string {
	f, err := os.Open(q.log)
	if err != nil {
		return ""
	}
	defer f.Close()
	const tail = 2048
	if st, err := f.Stat(); err == nil && st.Size() > tail {
		_, _ = f.Seek(-tail, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, tail))
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) > 4 {
		lines = lines[len(lines)-4:]
	}
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "; ")
}

// kill ends a QEMU whose guest does not run, and reaps it.
func (q *qemu) kill() {
	if q.conn != nil {
		q.conn.Close()
	}
	if q.child != nil {
		_ = q.child.Kill()
		_, _ = q.child.Wait()
		cgroup.Remove(groupName(q.child.Pid))
		q.child = nil
	}
	if q.proc != nil {
		q.proc.Close()
		q.proc = nil
	}
}

// letGo stops regarding QEMU as a child.
func (q *qemu) letGo() {
	q.conn.Close()
	q.proc.Close()
	_ = q.child.Release()
}

func copyFile(from, to string, uid, gid int) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil && os.Geteuid() == 0 {
		err = out.Chown(uid, gid)
	}
	return errors.Join(err, out.Close())
}

// groupName is the control group of a restored QEMU.
func groupName(pid int) string { return "restored-" + strconv.Itoa(pid) }
