package libvirt

import "errors"

var (
	// ErrLost says that the connection to the daemon has ended.
	ErrLost = errors.New("the connection to libvirt was lost")
	// ErrClosed says that Close was called.
	ErrClosed = errors.New("the libvirt client is closed")
	// ErrProtocol says that the peer does not speak libvirt's protocol.
	ErrProtocol = errors.New("the peer does not speak libvirt's protocol")
)

// Numbers of virErrorNumber that somebody here acts on.
const (
	codeNoDomain         = 42
	codeOperationInvalid = 55
	codeTimeout          = 68
)

// Error is libvirt's own refusal, word for word.
type Error struct {
	Code    int32 // virErrorNumber
	Message string
}

func (e *Error) Error() string { return "libvirt: " + e.Message }

func hasCode(err error, code int32) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Code == code
}

// IsNoDomain reports whether the daemon knows no such domain.
func IsNoDomain(err error) bool { return hasCode(err, codeNoDomain) }

// IsNotRunning reports whether the domain has no QEMU at the moment.
func IsNotRunning(err error) bool { return hasCode(err, codeOperationInvalid) }

// IsBusy reports whether another job (a save, a migration, a snapshot) kept the
// domain to itself for as long as libvirt waits.
func IsBusy(err error) bool { return hasCode(err, codeTimeout) }
