package guardian

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/heartbeat"
)

// Times that both sides must agree on.
const (
	// BeatEvery is how often the agent has to store a beat while Engaged.
	BeatEvery = 50 * time.Millisecond
	// AgentSilence is how long an engaged agent may be without a beat.
	AgentSilence = 500 * time.Millisecond
	// GuardianSilence is how long the guardian may be without a beat before
	// the agent takes it for stopped.
	GuardianSilence = 500 * time.Millisecond
)

// Acted says how far the guardian has gone; Control.GuardianActed.
type Acted uint32

const (
	NotActed      Acted = iota
	Acting              // it has begun to take over
	ActedResumed        // done; it sent `cont` and the VM runs
	ActedNothing        // done; there was nothing to resume
	ActedFailed         // done what it could; the report says what failed
	ServerKilled        // it killed a silent fault server and goes on watching
	actedSentinel       // keep last
)

func (a Acted) String() string {
	names := [...]string{"not acted", "acting", "resumed", "nothing to resume", "failed", "fault server killed"}
	if a < actedSentinel {
		return names[a]
	}
	return fmt.Sprintf("Acted(%d)", uint32(a))
}

const (
	controlBytes   = 4096
	controlMagic   = 0x31646775616b63 // "ckaugd1"
	controlVersion = 1
)

// Control is the shared page. Its words (see words) are atomic; it may be used by
// any goroutine until Close.
type Control struct {
	*words
	mem []byte
}

// Now is the clock of all beats: CLOCK_MONOTONIC in nanoseconds.
func Now() int64 { return heartbeat.NowNS() }

// BeatAgent, BeatServer and beatGuardian leave a sign of life.
func (c *Control) BeatAgent()    { c.AgentBeatNS.Store(Now()) }
func (c *Control) BeatServer()   { c.ServerBeatNS.Store(Now()) }
func (c *Control) beatGuardian() { c.GuardianBeatNS.Store(Now()) }

// left reports that the agent stopped a running VM and does not know it resumed.
func (c *Control) left() bool { return c.Running.Load() != 0 && c.Stopped.Load() != 0 }

// CreateControl makes a control page, on the state directory's tmpfs if that can
// be written, else in anonymous memory. The file is what other processes inherit.
func CreateControl() (*Control, *os.File, error) {
	f, err := controlFile()
	if err != nil {
		return nil, nil, fmt.Errorf("create control page: %w", err)
	}
	c, err := initControl(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return c, f, nil
}

func controlFile() (*os.File, error) {
	if err := os.MkdirAll(stateDir, 0o700); err == nil {
		fd, err := unix.Open(stateDir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return os.NewFile(uintptr(fd), "control"), nil
		}
	}
	fd, err := unix.MemfdCreate("ckagent-control", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "control"), nil
}

func initControl(f *os.File) (*Control, error) {
	if err := f.Truncate(controlBytes); err != nil {
		return nil, fmt.Errorf("size control page: %w", err)
	}
	c, err := mapControl(f)
	if err != nil {
		return nil, err
	}
	c.version.Store(controlVersion)
	c.magic.Store(controlMagic)
	return c, nil
}

// OpenControl maps a control page made by CreateControl; f stays the caller's.
func OpenControl(f *os.File) (*Control, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open control page: %w", err)
	}
	if st.Size() != controlBytes {
		return nil, fmt.Errorf("open control page: %d bytes, want %d", st.Size(), controlBytes)
	}
	c, err := mapControl(f)
	if err != nil {
		return nil, err
	}
	if c.magic.Load() != controlMagic || c.version.Load() != controlVersion {
		c.Close()
		return nil, errors.New("open control page: not one of this version")
	}
	return c, nil
}

func mapControl(f *os.File) (*Control, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var mem []byte
	var mapErr error
	if err := rc.Control(func(fd uintptr) {
		mem, mapErr = unix.Mmap(int(fd), 0, controlBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}); err != nil {
		return nil, err
	}
	if mapErr != nil {
		return nil, fmt.Errorf("map control page: %w", mapErr)
	}
	return &Control{words: wordsOf(mem), mem: mem}, nil
}

// Close unmaps the page; the words must not be used any more.
func (c *Control) Close() error {
	c.words = nil
	return unix.Munmap(c.mem)
}
