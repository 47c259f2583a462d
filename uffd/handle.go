package uffd

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
	"golang.org/x/sys/unix"
)

// retryLimit bounds how often a request that answers EAGAIN is repeated. EAGAIN
// lasts as long as an event (fork, remap, remove, unmap) of the target is
// unread; if reading it is the caller's own job, repeating for ever would wait
// for ourselves.
const retryLimit = 256

// Handle is an open userfaultfd whose handshake is done. Its methods may be
// called from any goroutine at once; Close must come after all others have
// returned (the owner of the fault loop joins it first), because the kernel
// reuses descriptor numbers.
type Handle struct {
	fd       atomic.Int64 // -1 once closed
	features Features     // negotiated
	kernel   Features     // what this kernel offers; 0 if not known
	ioctls   Ioctls
}

// Adopt takes over f, a fresh userfaultfd (of this or another process), and
// negotiates want. f is closed in any case: the handle keeps a duplicate, out of
// reach of the Go poller, whose epoll would be woken by every fault. Missing
// features are refused by name with ErrUnsupported. The O_NONBLOCK flag stays
// as it was.
func Adopt(f *os.File, want Features) (*Handle, error) {
	h, err := takeOver(f)
	if err != nil {
		return nil, err
	}
	if err := h.negotiate(want); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Resume takes over f, a userfaultfd whose handshake was done before (by a
// process that has died, or through another descriptor). f is closed in any
// case. What was negotiated is read from fdinfo.
func Resume(f *os.File) (*Handle, error) {
	h, err := takeOver(f)
	if err != nil {
		return nil, err
	}
	info, err := h.Info()
	if err == nil && !info.Negotiated {
		err = errors.New("userfaultfd resume: no handshake was done on this descriptor")
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	h.features = info.Features
	return h, nil
}

func takeOver(f *os.File) (*Handle, error) {
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("userfaultfd adopt: %w", err)
	}
	// Not f.Fd(): that would clear O_NONBLOCK on the description shared with
	// the other process.
	fd, dupErr := -1, error(nil)
	if err := conn.Control(func(p uintptr) {
		fd, dupErr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 3)
	}); err != nil {
		return nil, fmt.Errorf("userfaultfd adopt: %w", err)
	}
	if dupErr != nil {
		return nil, fmt.Errorf("userfaultfd adopt: duplicate descriptor: %w", dupErr)
	}
	h := &Handle{}
	h.fd.Store(int64(fd))
	return h, nil
}

func (h *Handle) negotiate(want Features) error {
	a := apiArg{api: apiVersion, features: uint64(want)}
	errno := h.api(&a)
	if errno == 0 {
		h.features, h.kernel, h.ioctls = want, Features(a.features), Ioctls(a.ioctls)
		return nil
	}
	e := &OpError{Op: "api", Errno: errno}
	switch errno {
	case unix.EINVAL:
		// The kernel does not say which bit it disliked; ask it on another
		// descriptor what it has.
		have, err := Probe()
		switch {
		case err != nil:
			e.Detail = fmt.Sprintf("feature set %s refused; what the kernel offers could not be asked: %v", want, err)
		case want&^have != 0:
			e.Kind, e.Detail = ErrUnsupported, "this kernel lacks "+(want&^have).String()
		default:
			e.Detail = "handshake already done on this descriptor"
		}
	case unix.EPERM:
		e.Detail = "EVENT_FORK needs CAP_SYS_PTRACE"
	case unix.ENOTTY:
		e.Kind, e.Detail = ErrUnsupported, "not a userfaultfd"
	}
	return e
}

// FD is the descriptor as userfaultfd-go's handle type. It stays the handle's
// own: do not close it.
func (h *Handle) FD() mapper.UFFD { return mapper.UFFD(h.fd.Load()) }

// Features are the negotiated ones.
func (h *Handle) Features() Features { return h.features }

// KernelFeatures are all the kernel offered in the handshake (0 after Resume).
func (h *Handle) KernelFeatures() Features { return h.kernel }

// Close drops the descriptor. If it was the last one, everything registered is
// unregistered, marks are removed (20-30 ms per GiB of armed 4 KiB pages) and
// waiting threads go on; those in a missing fault then read zeros.
func (h *Handle) Close() error {
	fd := h.fd.Swap(-1)
	if fd < 0 {
		return nil
	}
	if err := unix.Close(int(fd)); err != nil {
		return fmt.Errorf("close userfaultfd: %w", err)
	}
	return nil
}

// SetNonblock sets or clears O_NONBLOCK on the open file description, which is
// shared with every process that holds a copy. Wait needs it set (poll on a
// blocking userfaultfd answers POLLERR); a loop around a blocking read needs it
// clear.
func (h *Handle) SetNonblock(on bool) error {
	if err := unix.SetNonblock(int(h.fd.Load()), on); err != nil {
		return fmt.Errorf("userfaultfd nonblock: %w", err)
	}
	return nil
}

// Register makes the faults of mode in [start, start+length) arrive here. The
// range must lie in mappings of a kind that mode supports; the answer says which
// requests resolve them.
func (h *Handle) Register(start, length uint64, mode Mode) (Ioctls, error) {
	a := registerArg{rangeArg: rangeArg{start, length}, mode: uint64(mode)}
	if errno := h.register(&a); errno != 0 {
		err := opError("register", start, length, errno).(*OpError)
		explainRegister(err, mode, h.features)
		return 0, err
	}
	return Ioctls(a.ioctls), nil
}

// Unregister ends reporting for the range, removes its marks and wakes waiters.
func (h *Handle) Unregister(start, length uint64) error {
	a := rangeArg{start, length}
	if errno := h.unregister(&a); errno != 0 {
		return opError("unregister", start, length, errno)
	}
	return nil
}

// WriteProtect sets the mark on every page of the range: on present ones; on
// absent ones of shared memory; on absent anonymous ones only with
// FeatureWPUnpopulated. All of the range must be registered with ModeWP.
func (h *Handle) WriteProtect(start, length uint64) error {
	return h.protect("write-protect", writeProtectArg{rangeArg{start, length}, wpModeWP})
}

// Unprotect removes the mark and, if wake, wakes threads waiting in the range.
// Without wake they sleep on until Wake.
func (h *Handle) Unprotect(start, length uint64, wake bool) error {
	a := writeProtectArg{rangeArg{start, length}, wpModeDontWake}
	if wake {
		a.mode = 0
	}
	return h.protect("unprotect", a)
}

func (h *Handle) protect(op string, a writeProtectArg) error {
	errno := h.writeProtect(&a)
	for i := 0; errno == unix.EAGAIN && i < retryLimit; i++ {
		yield()
		errno = h.writeProtect(&a)
	}
	if errno == 0 {
		return nil
	}
	err := opError(op, a.start, a.length, errno).(*OpError)
	switch errno {
	case unix.ENOENT:
		err.Detail = "a part of the range is not mapped or not registered for write protection"
	case unix.EINVAL:
		err.Detail = "range is empty or not aligned to the (huge) page size"
	}
	return err
}

// yield lets the target's thread, whose unread event or mapping change makes a
// request answer EAGAIN, run first.
func yield() {
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	runtime.Gosched()
}

// Info is what /proc/self/fdinfo says of a userfaultfd.
type Info struct {
	Negotiated bool     // the handshake was done
	Features   Features // negotiated ones
	Pending    uint64   // faults nobody has read yet
	Waiting    uint64   // threads waiting for a fault to be resolved, read or not
}

// Info reads the state of the descriptor.
func (h *Handle) Info() (Info, error) {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.FormatInt(h.fd.Load(), 10))
	if err != nil {
		return Info{}, fmt.Errorf("userfaultfd info: %w", err)
	}
	return parseInfo(b)
}

func parseInfo(b []byte) (Info, error) {
	var in Info
	seen := 0
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		key, val, ok := strings.Cut(s.Text(), ":")
		if !ok {
			continue
		}
		val = strings.TrimSpace(val)
		var err error
		switch key {
		case "pending":
			in.Pending, err = strconv.ParseUint(val, 10, 64)
		case "total":
			in.Waiting, err = strconv.ParseUint(val, 10, 64)
		case "API":
			// aa:<features, hex>:<ioctls, hex>
			p := strings.Split(val, ":")
			if len(p) != 3 {
				return Info{}, fmt.Errorf("userfaultfd info: API line %q", val)
			}
			var f uint64
			f, err = strconv.ParseUint(p[1], 16, 64)
			in.Negotiated = f&featureInitialized != 0
			in.Features = Features(f &^ featureInitialized)
		default:
			continue
		}
		if err != nil {
			return Info{}, fmt.Errorf("userfaultfd info: %s: %w", key, err)
		}
		seen++
	}
	if seen < 3 {
		return Info{}, fmt.Errorf("userfaultfd info: not a userfaultfd: %w", ErrUnsupported)
	}
	return in, nil
}
