package keysock

import (
	"context"
	"fmt"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// inFlight is how many requests of a batch wait for their answers at a time.
const inFlight = 256

// BatchError is the refusal of one of many requests. Those before it were
// carried out, of those behind it some.
type BatchError struct {
	Index int
	Err   error
}

func (e *BatchError) Error() string { return fmt.Sprintf("request %d: %v", e.Index, e.Err) }

// Unwrap returns the refusal itself.
func (e *BatchError) Unwrap() error { return e.Err }

// AddPolicies is AddPolicy for many, in order, without waiting for each answer.
// Use it in a transaction. After an error, a *BatchError, there is no result.
func (c *Client) AddPolicies(ctx context.Context, ps []*ipsec.Policy) ([]*ipsec.Policy, error) {
	return c.putPolicies(ctx, pfkey.XSPDAdd, ps)
}

// UpdatePolicies is UpdatePolicy for many likewise.
func (c *Client) UpdatePolicies(ctx context.Context, ps []*ipsec.Policy) ([]*ipsec.Policy, error) {
	return c.putPolicies(ctx, pfkey.XSPDUpdate, ps)
}

// DeletePolicyIDs is DeletePolicyID for many likewise.
func (c *Client) DeletePolicyIDs(ctx context.Context, ids []uint32) error {
	return c.batch(ctx, len(ids), func(i int) (*pfkey.Message, error) {
		return byID(pfkey.XSPDDelete2, ids[i]), nil
	}, func(int, *pfkey.Message) error { return nil })
}

func (c *Client) putPolicies(ctx context.Context, t pfkey.MsgType, ps []*ipsec.Policy) ([]*ipsec.Policy, error) {
	got := make([]*ipsec.Policy, len(ps))
	err := c.batch(ctx, len(ps), func(i int) (*pfkey.Message, error) {
		m := &pfkey.Message{Header: pfkey.Header{Type: t}}
		if err := putPolicy(m, &PolicyInfo{Policy: *ps[i]}, withPrivate); err != nil {
			return nil, err
		}
		m.Policy.ID = 0
		return m, nil
	}, func(i int, a *pfkey.Message) error {
		p, err := takePolicy(a)
		if err == nil {
			got[i] = &p.Policy
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return got, nil
}

// batch makes n requests, several in a datagram where the server takes that.
// Answers are taken in another goroutine, each before batch returns.
func (c *Client) batch(ctx context.Context, n int, request func(i int) (*pfkey.Message, error), answer func(i int, a *pfkey.Message) error) error {
	calls := make([]*call, 0, min(n, inFlight))
	first := 0 // the index of calls[0]
	finish := func(keep int) error {
		for len(calls) > keep {
			k := calls[0]
			calls = calls[1:]
			first++
			if err := c.wait(ctx, k); err != nil {
				return &BatchError{first - 1, err}
			}
		}
		return nil
	}
	p := pack{c: c}
	for i := range n {
		m, err := request(i)
		if err == nil {
			k := &call{on: func(a *pfkey.Message) (bool, error) { return true, answer(i, a) }}
			var sent []*call
			sent, err = p.add(ctx, m, k)
			calls = append(calls, sent...)
		}
		if err == nil && i == n-1 {
			var sent []*call
			sent, err = p.flush(ctx)
			calls = append(calls, sent...)
		}
		if err != nil {
			// An earlier one comes first, those that were not sent yet included.
			if sent, e := p.flush(ctx); e == nil {
				calls = append(calls, sent...)
			}
			if err := finish(0); err != nil {
				return c.abandon(ctx, calls, err)
			}
			return &BatchError{i, err}
		}
		if err := finish(inFlight - 1); err != nil {
			return c.abandon(ctx, calls, err)
		}
	}
	return c.abandon(ctx, calls, finish(0))
}

// pack gathers requests that share a datagram.
type pack struct {
	c     *Client
	b     []byte
	calls []*call
}

// packLen is when a pack is full: two of them fill what is in flight.
const packLen = inFlight / 2

// add adds a request and sends what is full; it returns the calls that were sent.
func (p *pack) add(ctx context.Context, m *pfkey.Message, k *call) (sent []*call, err error) {
	if m.Seq == 0 {
		m.Seq = p.c.newSeq()
	}
	m.Pid = p.c.pid
	k.ready(m)
	at := len(p.b)
	b, err := m.Append(p.b)
	if err != nil {
		return nil, err
	}
	if at > 0 && len(b) > maxPack {
		one := append([]byte(nil), b[at:]...)
		if sent, err = p.flush(ctx); err != nil {
			return sent, err
		}
		b = append(p.b, one...)
	}
	if len(b) > maxMessage {
		return sent, refuse(syscall.EMSGSIZE, "message of %d octets", len(b))
	}
	p.b, p.calls = b, append(p.calls, k)
	if len(p.calls) >= packLen || !p.c.packs.Load() {
		more, err := p.flush(ctx)
		return append(sent, more...), err
	}
	return sent, nil
}

// flush sends what there is.
func (p *pack) flush(ctx context.Context) ([]*call, error) {
	if len(p.calls) == 0 {
		return nil, nil
	}
	err := p.c.send(ctx, p.b, p.calls...)
	clear(p.b)
	ks := p.calls
	p.b, p.calls = p.b[:0], nil
	if err != nil {
		return nil, err
	}
	return ks, nil
}

// abandon waits for the answers of what else is under way.
func (c *Client) abandon(ctx context.Context, calls []*call, err error) error {
	for _, k := range calls {
		_ = c.wait(ctx, k) // the first error counts
	}
	return err
}
