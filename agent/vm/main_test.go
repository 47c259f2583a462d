package vm

import (
	"io"
	"os"
	"runtime"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// headless in the environment makes of this program a process whose first thread has
// ended while another lives, until its standard input ends.
const headless = "CKAGENT_TEST_HEADLESS"

func init() {
	if os.Getenv(headless) != "" {
		runtime.LockOSThread() // the main goroutine stays on the first thread
	}
}

func TestMain(m *testing.M) {
	if os.Getenv(headless) != "" {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin) // whatever ends it
			os.Exit(0)
		}()
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	}
	goleak.VerifyTestMain(m)
}
