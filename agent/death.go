package agent

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/controller"
)

// judgeExit says how a VM ended whose monitor said nothing.
func judgeExit(exit unix.WaitStatus, manager string) (controller.Death, string) {
	switch {
	case exit.Signaled() && exit.Signal() == unix.SIGKILL && manager != "":
		return controller.Destroyed, "it was killed, and is managed by " + manager
	case exit.Signaled():
		switch sig := exit.Signal(); sig {
		case unix.SIGTERM, unix.SIGINT, unix.SIGHUP:
			return controller.Destroyed, fmt.Sprintf("it was ended by signal %v", sig)
		default:
			return controller.Crashed, fmt.Sprintf("it died by signal %v", sig)
		}
	case exit.Exited() && exit.ExitStatus() != 0:
		return controller.Crashed, fmt.Sprintf("QEMU ended with status %d", exit.ExitStatus())
	case exit.Exited():
		return controller.Unknown, "QEMU ended in order: its guest shut down, or it was told to quit"
	}
	return controller.Unknown, "its process has ended"
}
