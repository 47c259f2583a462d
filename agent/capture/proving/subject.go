package proving

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
)

// SubjectVerb is the hidden verb of our binary that leads to Subject.
const SubjectVerb = "__proving"

const (
	pageBytes    = source.PageBytes
	storeThreads = 3
)

// way is a way by which a subject's memory is written, and what its trial must have seen.
type way struct {
	accel string
	kind  source.Kind
	pages int
	// kernelFirst is where the pages begin that the kernel writes; pages: nowhere.
	kernelFirst int
	// enough pages must have come by the kernel's ring, of each kind of writer.
	enoughStores, enoughCopies uint64
}

func wayOf(accel string, kind source.Kind) way {
	if accel == KVM {
		return way{accel, kind, guestPages, guestPages, 100, 0}
	}
	return way{accel, kind, 4096, 3072, 200, 20}
}

// place is what a subject says of its memory, or why it has none.
type place struct {
	HVA   uint64 `json:"hva"`
	Error string `json:"error,omitempty"`
}

// Subject is the child process, with accelerator, kind of RAM and nice value as its
// arguments: it writes to its memory until its standard input ends.
func Subject(args []string) error {
	mem, failed, err := begin(args)
	if err != nil { // for whoever started us to tell
		return json.NewEncoder(os.Stdout).Encode(place{Error: err.Error()})
	}
	if err := json.NewEncoder(os.Stdout).Encode(place{HVA: addressOf(mem)}); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		ended <- err
	}()
	select {
	case err := <-failed:
		return err
	case err := <-ended:
		return err
	}
}

// begin makes the memory and has it written to.
func begin(args []string) (mem []byte, failed chan error, err error) {
	if len(args) != 3 {
		return nil, nil, fmt.Errorf("arguments %q", args)
	}
	accel, kind := args[0], args[1]
	nice, err := strconv.Atoi(args[2])
	if err != nil {
		return nil, nil, err
	}
	yield(nice)
	w := wayOf(accel, source.Anonymous)
	size := w.pages * pageBytes
	flags, fd := unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1
	if kind == kindNames[source.Shared] {
		var err error
		if fd, err = unix.MemfdCreate("proving", unix.MFD_CLOEXEC); err != nil {
			return nil, nil, os.NewSyscallError("memfd_create", err)
		}
		if err := unix.Ftruncate(fd, int64(size)); err != nil {
			return nil, nil, os.NewSyscallError("ftruncate", err)
		}
		flags = unix.MAP_SHARED
	}
	mem, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, nil, os.NewSyscallError("mmap", err)
	}
	for page := range w.pages {
		if page%8 < 6 { // the rest is absent when it is armed
			fill(mem, page, 1)
		}
	}
	failed = make(chan error, 1)
	if accel == KVM {
		err = startGuest(mem, failed)
	} else {
		err = startThreads(mem, w.kernelFirst, failed)
	}
	return mem, failed, err
}

// yield lets this process, which nobody has to wait for, come after others by its nice
// value; where the kernel groups processes by session (autogroup), its session too, which
// it has for itself. Threads to come inherit it. A preference, not a need.
func yield(nice int) {
	_ = unix.Setpriority(unix.PRIO_PGRP, 0, nice)
	_ = os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(nice)), 0)
}

// startThreads has threads store to the pages before kernelFirst, and the kernel copy
// into the others. They end with the process.
func startThreads(mem []byte, kernelFirst int, failed chan<- error) error {
	content, err := unix.MemfdCreate("content", unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	for id := range storeThreads {
		go func() {
			runtime.LockOSThread()
			rng := rand.New(rand.NewPCG(1, uint64(id)))
			for seed := uint64(id) << 32; ; seed++ {
				fill(mem, rng.IntN(kernelFirst), seed)
			}
		}()
	}
	go func() {
		runtime.LockOSThread()
		failed <- copyIn(mem[kernelFirst*pageBytes:], content)
	}()
	return nil
}

// fill writes a page such that a copy made in the middle of it shows.
func fill(mem []byte, page int, seed uint64) {
	p := mem[page*pageBytes:][:pageBytes]
	for i := 0; i < pageBytes; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], seed*0x9e3779b97f4a7c15+uint64(page))
	}
}

// copyIn has the kernel copy pages into the memory, for ever.
func copyIn(mem []byte, content int) error {
	page := make([]byte, pageBytes)
	rng := rand.New(rand.NewPCG(2, 2))
	for seed := uint64(1); ; seed++ {
		fill(page, 0, seed)
		if _, err := unix.Pwrite(content, page, 0); err != nil {
			return os.NewSyscallError("pwrite", err)
		}
		at := rng.IntN(len(mem)/pageBytes) * pageBytes
		if _, err := unix.Pread(content, mem[at:at+pageBytes], 0); err != nil {
			return os.NewSyscallError("pread", err)
		}
	}
}

// subject is the child as its parent sees it.
type subject struct {
	way   way
	cmd   *exec.Cmd
	stdin io.WriteCloser
	place place
}

// startSubject starts one, which is killed when ctx ends.
func startSubject(ctx context.Context, helper []string, w way, nice int) (s *subject, err error) {
	args := append(helper[1:len(helper):len(helper)], SubjectVerb, w.accel, kindNames[w.kind], strconv.Itoa(nice))
	s = &subject{way: w, cmd: exec.CommandContext(ctx, helper[0], args...)}
	// One processor for its scheduler is not enough for threads that never yield.
	s.cmd.Env = append(os.Environ(), fmt.Sprintf("GOMAXPROCS=%d", storeThreads+4))
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true}
	s.cmd.Stderr = os.Stderr
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the subject: %w", err)
	}
	err = json.NewDecoder(out).Decode(&s.place)
	if err == nil && s.place.Error != "" {
		err = errors.New(s.place.Error)
	}
	if err != nil {
		s.end()
		return nil, fmt.Errorf("the subject did not begin: %w", err)
	}
	return s, nil
}

// end kills and reaps the subject.
func (s *subject) end() {
	_ = s.cmd.Process.Kill() // it may have ended
	_ = s.cmd.Wait()
	_ = s.stdin.Close()
}
