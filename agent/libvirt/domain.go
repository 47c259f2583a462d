package libvirt

import (
	"context"
	"fmt"
	"os"
	"time"
)

// Domain is how libvirt names a domain.
type Domain struct {
	Name string
	UUID [16]byte
	ID   int32 // -1 while it does not run
}

// Event is an event of a domain's QEMU, with the time QEMU gave it.
type Event struct {
	Domain  Domain
	Name    string
	Details string // JSON; empty if it has none
	Seconds int64
	Micros  uint32
}

// Time is when QEMU saw it.
func (e *Event) Time() time.Time { return time.Unix(e.Seconds, int64(e.Micros)*1000) }

// State is virDomainState.
type State int32

// What a domain may be doing, as far as it matters here.
const (
	Running     State = 1
	Blocked     State = 2
	Paused      State = 3
	ShutDown    State = 4 // on its way
	ShutOff     State = 5
	Crashed     State = 6
	PMSuspended State = 7
)

func (s State) String() string {
	switch s {
	case Running, Blocked:
		return "running"
	case Paused:
		return "paused"
	case ShutDown:
		return "shutting down"
	case ShutOff:
		return "shut off"
	case Crashed:
		return "crashed"
	case PMSuspended:
		return "suspended by its guest"
	}
	return fmt.Sprintf("state %d", int32(s))
}

// Alive reports whether the domain has a QEMU.
func (s State) Alive() bool { return s != ShutOff && s != Crashed }

// Version is the daemon's: 9.0.0 is 9000000.
func (c *Client) Version(ctx context.Context) (uint64, error) {
	reply, err := c.call(ctx, programRemote, procLibVersion, nil, nil)
	if err != nil {
		return 0, fmt.Errorf("ask for libvirt's version: %w", err)
	}
	d := decoder{b: reply}
	v := uint64(d.hyper())
	return v, d.failed("version")
}

// Lookup finds a domain; IsNoDomain tells that there is none.
func (c *Client) Lookup(ctx context.Context, uuid [16]byte) (Domain, error) {
	var e encoder
	e.opaque(uuid[:])
	reply, err := c.call(ctx, programRemote, procDomainByUUID, e.b, nil)
	if err != nil {
		return Domain{}, fmt.Errorf("look up domain %x: %w", uuid, err)
	}
	d := decoder{b: reply}
	dom := d.domain()
	return dom, d.failed("domain")
}

// XMLFlags is virDomainXMLFlags.
type XMLFlags uint32

// XMLMigratable asks for what a save image carries, passwords included.
const XMLMigratable XMLFlags = 8

// XML describes the domain.
func (c *Client) XML(ctx context.Context, dom Domain, flags XMLFlags) (string, error) {
	var e encoder
	e.domain(dom)
	e.uint(uint32(flags))
	reply, err := c.call(ctx, programRemote, procDomainXML, e.b, nil)
	if err != nil {
		return "", fmt.Errorf("describe domain %s: %w", dom.Name, err)
	}
	d := decoder{b: reply}
	text := d.string(maxStringBytes)
	return text, d.failed("domain XML")
}

// Reason is why a domain is in its state; its numbers depend on the state.
type Reason int32

// PausedUnknown is the reason of a pause that libvirt did not bring about and
// could not explain: QEMU stopped, or somebody stopped it through a monitor.
const PausedUnknown Reason = 0

// State says what the domain does, and why.
func (c *Client) State(ctx context.Context, dom Domain) (State, Reason, error) {
	var e encoder
	e.domain(dom)
	e.uint(0)
	reply, err := c.call(ctx, programRemote, procDomainState, e.b, nil)
	if err != nil {
		return 0, 0, fmt.Errorf("state of domain %s: %w", dom.Name, err)
	}
	d := decoder{b: reply}
	s, r := State(d.int()), Reason(d.int())
	return s, r, d.failed("state")
}

// Autostart reports whether the daemon starts the domain by itself, when it or the
// host is started.
func (c *Client) Autostart(ctx context.Context, dom Domain) (bool, error) {
	var e encoder
	e.domain(dom)
	reply, err := c.call(ctx, programRemote, procDomainAutostart, e.b, nil)
	if err != nil {
		return false, fmt.Errorf("autostart of domain %s: %w", dom.Name, err)
	}
	d := decoder{b: reply}
	on := d.int() != 0
	return on, d.failed("autostart")
}

// FilesVersion is the first libvirt that passes descriptors to a monitor.
const FilesVersion = 8002000

// Monitor runs a QMP command, which must not have an id, on the domain's QEMU and
// returns the reply whole. A descriptor goes with it where file is given. libvirt
// marks the domain as tainted by it.
func (c *Client) Monitor(ctx context.Context, dom Domain, command string, file *os.File) (string, error) {
	var e encoder
	e.domain(dom)
	e.string(command)
	e.uint(0)
	proc := uint32(procMonitor)
	if file != nil {
		proc = procMonitorWithFiles
	}
	reply, err := c.call(ctx, programQEMU, proc, e.b, file)
	if err != nil {
		return "", err
	}
	d := decoder{b: reply}
	text := d.string(maxStringBytes)
	return text, d.failed("monitor reply")
}

// Watch has see called with every event of the domain's monitor from now on, by
// the reader: it must be quick and must not call the client. Once a connection.
func (c *Client) Watch(ctx context.Context, dom Domain, see func(Event)) error {
	c.mu.Lock()
	c.event = see
	c.mu.Unlock()
	var e encoder
	e.present(true)
	e.domain(dom)
	e.present(false) // all events
	e.uint(0)
	if _, err := c.call(ctx, programQEMU, procMonitorRegister, e.b, nil); err != nil {
		return fmt.Errorf("watch the monitor of domain %s: %w", dom.Name, err)
	}
	return nil
}
