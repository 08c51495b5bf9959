package ike

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// TestInit: "sa init" negotiates when a policy is loaded, or is there when ike
// starts, without a packet, and once.
func TestInit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		defer a.stop(t)
		defer b.stop(t)
		reload := func() {
			a.m.event(keysock.PoliciesChanged{})
			time.Sleep(time.Second)
			synctest.Wait()
		}
		reload()
		wantPair(t, a, b, 0)
		a.m.mu.Lock()
		a.m.policies[0].ID = 9
		a.m.policies[0].Flags = ipsec.PolicyInit
		a.m.mu.Unlock()
		reload()
		wantPair(t, a, b, 1)
		reload()
		wantPair(t, a, b, 1)
	})
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		b := newNode(t, n, addrB, addrA, "correct horse battery")
		a := newNode(t, n, addrA, addrB, "correct horse battery", func(_ *Config, m *missiu) { m.policies[0].Flags = ipsec.PolicyInit })
		defer a.stop(t)
		defer b.stop(t)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
	})
}
