package keysock

import (
	"context"
	"fmt"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// inFlight is how many requests of a batch wait for their answers at a time.
const inFlight = 64

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

// batch makes n requests. Answers are taken in another goroutine, each before
// batch returns.
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
	for i := range n {
		m, err := request(i)
		if err == nil {
			k := &call{on: func(a *pfkey.Message) (bool, error) { return true, answer(i, a) }}
			if err = c.start(ctx, m, k); err == nil {
				calls = append(calls, k)
			}
		}
		if err != nil {
			// An earlier one comes first.
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

// abandon waits for the answers of what else is under way.
func (c *Client) abandon(ctx context.Context, calls []*call, err error) error {
	for _, k := range calls {
		_ = c.wait(ctx, k) // the first error counts
	}
	return err
}
