package guestagent

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
)

// PortName is the name by which a guest's agent knows its port.
const PortName = "org.qemu.guest_agent.0"

// Monitor is what is needed of a QMP connection.
type Monitor interface {
	Execute(ctx context.Context, command string, args, out any) error
}

// Channel is how the agent of a guest is reached.
type Channel struct {
	Network string // unix or tcp
	Address string
	Taken   bool // somebody is connected, and QEMU serves one client
}

// Find asks QEMU for the way to its guest's agent. A VM without one is
// problem.Refused. That there is a channel does not say that an agent answers.
func Find(ctx context.Context, q Monitor) (Channel, error) {
	label, err := chardev(ctx, q)
	if err != nil {
		return Channel{}, problem.New(problem.CodeOf(err), "find guest agent", "", "%w", err)
	}
	if label == "" {
		return Channel{}, problem.New(problem.Refused, "find guest agent", "", "the VM has no virtio-serial port named %s", PortName).
			WithHint("start it with -device virtio-serial-pci -chardev socket,id=ga,path=PATH,server=on,wait=off " +
				"-device virtserialport,chardev=ga,name=" + PortName + ", and run qemu-ga in the guest")
	}
	var list []struct {
		Label    string `json:"label"`
		Filename string `json:"filename"`
	}
	if err := q.Execute(ctx, "query-chardev", nil, &list); err != nil {
		return Channel{}, problem.New(problem.CodeOf(err), "find guest agent", label, "%w", err)
	}
	for _, c := range list {
		if c.Label == label {
			if ch, ok := parseFilename(c.Filename); ok {
				return ch, nil
			}
			return Channel{}, problem.New(problem.Refused, "find guest agent", label, "its channel is %q, which nobody can connect to", c.Filename).
				WithHint("make it a listening socket: -chardev socket,id=%s,path=PATH,server=on,wait=off", label)
		}
	}
	return Channel{}, problem.New(problem.Refused, "find guest agent", label, "QEMU does not know its character device")
}

// chardev is the label of the agent's character device, "" without an agent.
func chardev(ctx context.Context, q Monitor) (string, error) {
	for _, dir := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		var children []struct{ Name, Type string }
		if err := q.Execute(ctx, "qom-list", map[string]string{"path": dir}, &children); err != nil {
			return "", fmt.Errorf("qom-list %s: %w", dir, err)
		}
		for _, c := range children {
			if c.Type != "child<virtserialport>" {
				continue
			}
			get := func(property string) (s string, err error) {
				var raw json.RawMessage
				path := dir + "/" + c.Name
				if err = q.Execute(ctx, "qom-get", map[string]string{"path": path, "property": property}, &raw); err == nil {
					err = json.Unmarshal(raw, &s)
				}
				if err != nil {
					return "", fmt.Errorf("qom-get %s %s: %w", path, property, err)
				}
				return s, nil
			}
			name, err := get("name")
			if err != nil {
				return "", err
			}
			if name == PortName {
				return get("chardev")
			}
		}
	}
	return "", nil
}

// parseFilename reads what query-chardev says of a socket:
// "disconnected:unix:/run/ga.sock,server=on", "tcp:127.0.0.1:5000,server=on <-> ...".
func parseFilename(s string) (Channel, bool) {
	rest, free := strings.CutPrefix(s, "disconnected:")
	network, rest, ok := strings.Cut(rest, ":")
	if !ok || network != "unix" && network != "tcp" {
		return Channel{}, false
	}
	address, options, _ := strings.Cut(rest, ",")
	if address == "" || !strings.HasPrefix(options, "server") {
		return Channel{}, false
	}
	if _, abstract := strings.CutPrefix(options, "server=on,abstract=on"); abstract && network == "unix" {
		address = "@" + address
	}
	return Channel{Network: network, Address: address, Taken: !free}, true
}
