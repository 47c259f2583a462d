package vm

import (
	"context"
	"fmt"
	"regexp"

	"github.com/ckagent/ckagent/agent/libvirt"
	"github.com/ckagent/ckagent/agent/qmp"
)

// Domain is a VM as libvirt knows it.
type Domain struct {
	Name   string `json:"name"`
	URI    string `json:"uri"`    // qemu:///system, qemu:///session
	Socket string `json:"socket"` // of the daemon
	// XML is what libvirt itself puts into a saved image, without the passwords.
	XML      string `json:"xml"`
	Redacted bool   `json:"redacted"` // it had some
}

// domain asks libvirt's daemon to describe the VM. A VM whose monitor is another
// one than libvirt's can do without: the daemon may be gone.
func (t *Target) domain(ctx context.Context) (*Domain, []Secret, error) {
	m, err := qmp.OpenManaged(ctx, t.Process.PID)
	if err != nil {
		if !t.Endpoint.Libvirt {
			return nil, nil, nil
		}
		return nil, nil, err
	}
	d := &Domain{Name: m.Domain.Name, URI: m.URI, Socket: m.Socket}
	full, err := m.Client.XML(ctx, m.Domain, libvirt.XMLMigratable)
	if closed := m.Client.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return nil, nil, fmt.Errorf("libvirt: %w", err)
	}
	if d.XML = redactXML(full); d.XML == full {
		return d, nil, nil
	}
	d.Redacted = true
	return d, []Secret{{Option: "libvirt", Key: "password", Prompt: "the passwords in the libvirt domain " + d.Name}}, nil
}

// A description that can be migrated has the passwords of displays in it. What
// libvirt does not know to be secret are arguments and variables handed on to QEMU,
// and passwords in addresses.
var (
	xmlPassword = regexp.MustCompile(`(<[^<>]*?)\s+passwd=(?:'[^']*'|"[^"]*")`)
	xmlArgument = regexp.MustCompile(`(<qemu:arg value=['"][^'"]*?\b(?:password|passwd|passphrase|data|token|cookie)=)([^'",]+)`)
	xmlVariable = regexp.MustCompile(`(<qemu:env name=['"][^'"]*(?i:secret|passw|token|credential)[^'"]*['"] value=['"])([^'"]+)`)
)

const redactedXML = "[redacted]"

func redactXML(text string) string {
	text = xmlPassword.ReplaceAllString(text, "${1}")
	text = xmlArgument.ReplaceAllString(text, "${1}"+redactedXML)
	text = xmlVariable.ReplaceAllString(text, "${1}"+redactedXML)
	return urlUser.ReplaceAllString(text, "${1}"+redactedXML+"${3}")
}
