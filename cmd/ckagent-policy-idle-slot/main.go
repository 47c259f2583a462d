// Command ckagent-policy-idle-slot is the policy `idle-slot` as a plugin; ckagent starts it.
package main

import (
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

func main() { policy.Serve(shipped.NewIdleSlot) }
