package vm

import "context"

// Monitor is what this package needs of a QMP connection; *qmp.Client is one.
// Being an interface it lets tests play recorded transcripts.
type Monitor interface {
	// Execute runs a command; args and out may be nil. QEMU's own refusals are
	// *qmp.Error.
	Execute(ctx context.Context, command string, args, out any) error
	// HMP runs a line of the human monitor and returns what it printed.
	HMP(ctx context.Context, line string) (string, error)
}
