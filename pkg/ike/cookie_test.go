package ike

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/proto/ikev2"
)

// far gives the way between hosts a length: d in each direction.
func (n *network) far(d time.Duration, also func(packet)) {
	n.setDrop(func(p packet) bool {
		if also != nil {
			also(p)
		}
		time.AfterFunc(d, func() { n.deliver(p) })
		return true
	})
}

// Somebody near the initiator, who sees its requests, answers each IKE_SA_INIT with
// COOKIE before the peer does, which may demand one itself. He does not keep them
// apart, however far the peer is; and where there is nobody, a cookie costs a round
// trip alone.
func TestForgedCookies(t *testing.T) {
	for _, rtt := range []time.Duration{2 * time.Millisecond, 100 * time.Millisecond, 400 * time.Millisecond} {
		for _, demands := range []bool{false, true} {
			for _, each := range []int{0, 1, 3} { // cookies with each request
				for _, same := range []bool{false, true} {
					if same && each != 1 {
						continue
					}
					t.Run(fmt.Sprintf("rtt %v/demands %v/%d/same %v", rtt, demands, each, same), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							n, a, b := pair(t, func(c *Config, _ *missiu) { c.Limits.AlwaysCookie = demands })
							count := 0
							n.far(rtt/2, func(p packet) {
								m, err := ikev2.Parse(p.data)
								if err != nil || p.from.Addr() != addrA || m.Exchange != ikev2.IKE_SA_INIT {
									return
								}
								for range each {
									if count++; same {
										count = 1
									}
									f := &ikev2.Message{Header: m.Header, Payloads: []ikev2.Payload{&ikev2.Notify{Type: ikev2.COOKIE, Data: fmt.Append(nil, "cookie ", count)}}}
									f.Flags = ikev2.FlagResponse
									b, err := f.Append(nil)
									if err != nil {
										t.Fatal(err)
									}
									time.AfterFunc(rtt/10, func() { n.deliver(packet{p.to, p.from, b}) })
								}
							})
							start := time.Now()
							a.acquire(1, addrA, addrB)
							for len(a.m.list()) == 0 && time.Since(start) < time.Minute {
								time.Sleep(time.Millisecond)
								synctest.Wait()
							}
							took := time.Since(start)
							time.Sleep(time.Second)
							wantPair(t, a, b, 1)
							if took > 20*time.Second {
								t.Errorf("took %v", took)
							}
							trips := 3 // IKE_SA_INIT, IKE_INTERMEDIATE, IKE_AUTH
							if demands {
								trips++
							}
							if limit := time.Duration(trips)*rtt + 10*time.Millisecond; each == 0 && took > limit {
								t.Errorf("took %v, want %v", took, limit)
							}
							t.Logf("took %v, %d cookies forged", took, count)
							n.setDrop(nil)
							a.stop(t)
							b.stop(t)
						})
					})
				}
			}
		}
	}
}
