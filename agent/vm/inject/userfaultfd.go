package inject

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// Options of Userfaultfd.
type Options struct {
	// KeepInside leaves the descriptor open in the target as well, so that it
	// outlives us (lazy restore); else ours is the only one.
	KeepInside bool
	// SyscallOnly skips /dev/userfaultfd and uses userfaultfd(2).
	SyscallOnly bool
	// VCPUs are threads that run the guest (query-cpus-fast); they are taken only
	// if nothing else can be. Without it they are known by name or by KVM_RUN.
	VCPUs []int
	// Borrow, if not nil, is told each thread that is about to be borrowed, before it
	// is touched: whoever outlives us asks Home about it before looking for leftovers.
	Borrow func(tid int)
	// Trace, if not nil, is filled with how it went.
	Trace *Trace
}

// Trace tells how a descriptor was made.
type Trace struct {
	TID     int           // the thread that was borrowed
	Device  bool          // through /dev/userfaultfd
	Stopped time.Duration // how long the thread was held
}

const (
	// ioctlNew is USERFAULTFD_IOC_NEW, _IO(0xAA, 0x00).
	ioctlNew = 0xaa00
	uffdFlag = unix.O_CLOEXEC | unix.O_NONBLOCK
)

// Userfaultfd makes a userfaultfd for the memory of another process and returns
// our descriptor of it (close-on-exec, non-blocking, no UFFDIO_API yet).
// remoteFD is its number inside with KeepInside, else -1.
//
// An open /dev/userfaultfd is passed into the target, which then needs neither
// right, sysctl nor device node of its own; where the device is missing or the
// way is barred, userfaultfd(2) is tried, which asks the target for
// CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1.
func Userfaultfd(ctx context.Context, pid int, o Options) (local *os.File, remoteFD int, err error) {
	return userfaultfd(ctx, pid, 0, o)
}

// userfaultfd is Userfaultfd in one given thread if tid is not 0.
func userfaultfd(ctx context.Context, pid, tid int, o Options) (local *os.File, remoteFD int, err error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, -1, problem.New(problem.NotFound, "userfaultfd", pidObject(pid), "%w", err)
	}
	defer unix.Close(pidfd)
	m := maker{pid: pid, pidfd: pidfd, device: -1}
	if !o.SyscallOnly {
		m.device, m.deviceErr = unix.Open(devicePath, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if m.deviceErr == nil {
			defer unix.Close(m.device)
		}
	}
	m.address = socketAddress()
	s, err := open(ctx, pid, tid, o)
	if err != nil {
		return nil, -1, err
	}
	m.s = s
	fd, remote := -1, -1
	s.do(func() { fd, remote, err = m.make(ctx, o.KeepInside) })
	closeErr := s.Close()
	if o.Trace != nil {
		*o.Trace = Trace{TID: s.TID(), Device: m.usedDevice, Stopped: s.Stopped()}
	}
	if err == nil && closeErr != nil && !errors.Is(closeErr, ErrGone) {
		err = closeErr
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, -1, err
	}
	return os.NewFile(uintptr(fd), "userfaultfd of "+pidObject(pid)), remote, nil
}

// maker is one attempt; everything it needs is made before the target stops.
type maker struct {
	s          *Session
	pid, pidfd int
	device     int // our open /dev/userfaultfd, -1 none
	deviceErr  error
	usedDevice bool
	address    *unix.SockaddrUnix
}

func socketAddress() *unix.SockaddrUnix {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return &unix.SockaddrUnix{Name: "@" + socketPrefix + hex.EncodeToString(b[:])}
}

// sys runs one call in the target, on the tracing thread.
func (m *maker) sys(ctx context.Context, name string, nr uintptr, args ...uintptr) (int, error) {
	r, err := m.s.t.invoke(ctx, name, nr, args...)
	return int(r), err
}

// broken tells an error of the session, after which nothing more can be run in
// the target, from a call that failed there.
func broken(err error) bool {
	var p *problem.Error
	return errors.As(err, &p) && p.Code != problem.Refused
}

func (m *maker) make(ctx context.Context, keep bool) (local, remote int, err error) {
	remote, deviceErr := -1, m.deviceErr
	if m.device >= 0 {
		remote, deviceErr = m.fromDevice(ctx)
		m.usedDevice = deviceErr == nil
		if broken(deviceErr) {
			return -1, -1, deviceErr
		}
	}
	if remote < 0 {
		if remote, err = m.sys(ctx, "userfaultfd", unix.SYS_USERFAULTFD, uffdFlag); err != nil {
			return -1, -1, m.explain(err, deviceErr)
		}
	}
	local, err = unix.PidfdGetfd(m.pidfd, remote, 0)
	if err == nil && keep {
		return local, remote, nil
	}
	if _, cerr := m.sys(ctx, "close-uffd", unix.SYS_CLOSE, uintptr(remote)); err == nil {
		err = cerr
	}
	if err != nil {
		if local >= 0 {
			unix.Close(local)
		}
		return -1, -1, problem.New(problem.Failed, "userfaultfd", pidObject(m.pid), "take descriptor: %w", err)
	}
	return local, -1, nil
}

// fromDevice passes /dev/userfaultfd into the target and has it make one there.
// The socket that carries it is one datagram socket that sends to itself, so
// that never more than two descriptors are open inside.
func (m *maker) fromDevice(ctx context.Context) (int, error) {
	sock, err := m.sys(ctx, "socket", unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	device, err := m.receiveDevice(ctx, sock)
	if broken(err) {
		return -1, err
	}
	if _, cerr := m.sys(ctx, "close-socket", unix.SYS_CLOSE, uintptr(sock)); err == nil {
		err = cerr
	}
	if err != nil {
		return -1, err
	}
	fd, err := m.sys(ctx, "ioctl", unix.SYS_IOCTL, uintptr(device), ioctlNew, uffdFlag)
	if broken(err) {
		return -1, err
	}
	if _, cerr := m.sys(ctx, "close-device", unix.SYS_CLOSE, uintptr(device)); cerr != nil {
		return -1, cerr
	}
	if err != nil {
		return -1, fmt.Errorf("USERFAULTFD_IOC_NEW: %w", err)
	}
	return fd, nil
}

// receiveDevice sends our device through the target's socket, of which we take a
// duplicate, and lets the target receive it.
func (m *maker) receiveDevice(ctx context.Context, sock int) (int, error) {
	dup, err := unix.PidfdGetfd(m.pidfd, sock, 0)
	if err != nil {
		return -1, fmt.Errorf("pidfd_getfd: %w", err)
	}
	defer unix.Close(dup)
	if err := unix.Bind(dup, m.address); err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}
	hook("bound")
	if err := unix.Sendmsg(dup, []byte{0}, unix.UnixRights(m.device), m.address, unix.MSG_DONTWAIT); err != nil {
		return -1, fmt.Errorf("send descriptor: %w", err)
	}
	hook("sent")
	base, _ := m.s.Scratch()
	msg, control := receiveHeader(base)
	if err := m.s.Write(base, msg); err != nil {
		return -1, err
	}
	if _, err := m.sys(ctx, "recvmsg", unix.SYS_RECVMSG, uintptr(sock), uintptr(base),
		unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC); err != nil {
		return -1, fmt.Errorf("recvmsg: %w", err)
	}
	got := make([]byte, unix.CmsgSpace(4))
	if err := m.s.Read(control, got); err != nil {
		return -1, err
	}
	cmsgs, err := unix.ParseSocketControlMessage(got)
	if err != nil || len(cmsgs) != 1 {
		return -1, fmt.Errorf("no descriptor in the message: %w", errors.Join(err, unix.EPROTO))
	}
	fds, err := unix.ParseUnixRights(&cmsgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("no descriptor in the message: %w", errors.Join(err, unix.EPROTO))
	}
	return fds[0], nil
}

// receiveHeader is a struct msghdr at base with room for one byte and one
// descriptor, and the address of the control part.
func receiveHeader(base uint64) (msg []byte, control uint64) {
	const header, iovec = 56, 16
	msg = make([]byte, header+iovec+8+unix.CmsgSpace(4))
	iov, data := base+header, base+header+iovec
	control = data + 8
	ne := binary.NativeEndian
	ne.PutUint64(msg[16:], iov)                       // msg_iov
	ne.PutUint64(msg[24:], 1)                         // msg_iovlen
	ne.PutUint64(msg[32:], control)                   // msg_control
	ne.PutUint64(msg[40:], uint64(unix.CmsgSpace(4))) // msg_controllen
	ne.PutUint64(msg[header:], data)
	ne.PutUint64(msg[header+8:], 1)
	return msg, control
}

// explain turns the failure of both ways into advice.
func (m *maker) explain(err, deviceErr error) error {
	if broken(err) {
		return err
	}
	p := problem.New(problem.Refused, "userfaultfd", pidObject(m.pid),
		"the kernel gives it none: userfaultfd(2): %w; %s: %w", err, devicePath, errors.Join(deviceErr, err))
	switch {
	case errors.Is(deviceErr, unix.ENOENT):
		return p.WithHint("this kernel has no %s (Linux 6.1); set vm.unprivileged_userfaultfd=1", devicePath)
	case errors.Is(deviceErr, unix.EACCES), errors.Is(deviceErr, unix.EPERM):
		return p.WithHint("let ckagent open %s (run it as root, or give its group access), or set vm.unprivileged_userfaultfd=1", devicePath)
	case errors.Is(err, unix.ENOSYS):
		return p.WithHint("the kernel was built without CONFIG_USERFAULTFD")
	}
	return p.WithHint("set vm.unprivileged_userfaultfd=1, or let ckagent use %s", devicePath)
}
