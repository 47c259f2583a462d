// Command ckagent-policy-auto is the policy `auto` as a plugin; ckagent starts it.
package main

import (
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

func main() { policy.Serve(shipped.NewAuto) }
