package keysock

import (
	"context"
	"encoding/json"
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// AddPolicy adds p and returns it with the ID and the reqids that the engine gave.
// EEXIST: there is one with this direction and selector.
func (c *Client) AddPolicy(ctx context.Context, p *ipsec.Policy) (*ipsec.Policy, error) {
	return c.putPolicy(ctx, pfkey.XSPDAdd, p)
}

// UpdatePolicy adds p or replaces the one with its direction and selector, which
// keeps its ID.
func (c *Client) UpdatePolicy(ctx context.Context, p *ipsec.Policy) (*ipsec.Policy, error) {
	return c.putPolicy(ctx, pfkey.XSPDUpdate, p)
}

func (c *Client) putPolicy(ctx context.Context, t pfkey.MsgType, p *ipsec.Policy) (*ipsec.Policy, error) {
	m := &pfkey.Message{Header: pfkey.Header{Type: t}}
	if err := putPolicy(m, &PolicyInfo{Policy: *p}, withPrivate); err != nil {
		return nil, err
	}
	m.Policy.ID = 0
	i, err := c.onePolicy(ctx, m)
	if err != nil {
		return nil, err
	}
	return &i.Policy, nil
}

// onePolicy is do for a request that is answered with a policy.
func (c *Client) onePolicy(ctx context.Context, m *pfkey.Message) (i *PolicyInfo, err error) {
	err = c.do(ctx, m, func(a *pfkey.Message) (err error) {
		i, err = takePolicy(a)
		return err
	})
	if err != nil {
		return nil, err
	}
	return i, nil
}

// DeletePolicy removes the policy with this direction and selector. ENOENT: there is none.
func (c *Client) DeletePolicy(ctx context.Context, dir ipsec.Direction, sel ipsec.Selector) error {
	m := &pfkey.Message{
		Header: pfkey.Header{Type: pfkey.XSPDDelete},
		Policy: &pfkey.Policy{Dir: pfkey.Dir(dir)},
	}
	if err := putSelector(m, sel); err != nil {
		return err
	}
	return c.do(ctx, m, nil)
}

// DeletePolicyID removes a policy by its ID. ENOENT: there is none.
func (c *Client) DeletePolicyID(ctx context.Context, id uint32) error {
	return c.do(ctx, byID(pfkey.XSPDDelete2, id), nil)
}

// GetPolicy returns a policy by its ID. ENOENT: there is none.
func (c *Client) GetPolicy(ctx context.Context, id uint32) (*PolicyInfo, error) {
	return c.onePolicy(ctx, byID(pfkey.XSPDGet, id))
}

func byID(t pfkey.MsgType, id uint32) *pfkey.Message {
	return &pfkey.Message{Header: pfkey.Header{Type: t}, Policy: &pfkey.Policy{ID: id}}
}

// DumpPolicies returns all policies in the order in which they are tried. EBUSY:
// another dump on this client is unfinished.
func (c *Client) DumpPolicies(ctx context.Context) ([]*PolicyInfo, error) {
	var l []*PolicyInfo
	err := c.doDump(ctx, &pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDDump}}, func(a *pfkey.Message) error {
		i, err := takePolicy(a)
		if err == nil {
			l = append(l, i)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

// FlushPolicies removes all policies.
func (c *Client) FlushPolicies(ctx context.Context) error {
	return c.do(ctx, &pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDFlush}}, nil)
}

// Begin opens a policy transaction: the policy requests of this client work on a
// draft until Commit or Abort. EBUSY: one is open.
func (c *Client) Begin(ctx context.Context) error {
	return c.do(ctx, &pfkey.Message{Header: pfkey.Header{Type: pfkey.XBegin}}, nil)
}

// Commit puts the draft in force, all of it or, with an error, nothing.
func (c *Client) Commit(ctx context.Context) error {
	return c.do(ctx, &pfkey.Message{Header: pfkey.Header{Type: pfkey.XCommit}}, nil)
}

// Abort forgets the draft.
func (c *Client) Abort(ctx context.Context) error {
	return c.do(ctx, &pfkey.Message{Header: pfkey.Header{Type: pfkey.XAbort}}, nil)
}

// AddAddress gives the TAP or TUN of the engine an address, which goes when the
// engine is stopped. One that it has is no error.
func (c *Client) AddAddress(ctx context.Context, p netip.Prefix) error {
	return c.address(ctx, pfkey.XAddrAdd, p)
}

// DeleteAddress takes it away; ENOENT if it is not there.
func (c *Client) DeleteAddress(ctx context.Context, p netip.Prefix) error {
	return c.address(ctx, pfkey.XAddrDelete, p)
}

func (c *Client) address(ctx context.Context, t pfkey.MsgType, p netip.Prefix) error {
	if !p.IsValid() {
		return refuse(syscall.EINVAL, "address %v", p)
	}
	a := &pfkey.Address{PrefixLen: uint8(p.Bits()), Addr: netip.AddrPortFrom(p.Addr(), 0)}
	return c.do(ctx, &pfkey.Message{Header: pfkey.Header{Type: t}, Src: a}, nil)
}

// Status returns a JSON document about the daemon.
func (c *Client) Status(ctx context.Context) (json.RawMessage, error) {
	var doc json.RawMessage
	m := &pfkey.Message{Header: pfkey.Header{Type: pfkey.XStatus}}
	err := c.exchange(ctx, m, &call{on: func(a *pfkey.Message) (bool, error) {
		if a.Blob == nil {
			return true, refuse(syscall.EBADMSG, "X_STATUS answer without a document")
		}
		doc = append(doc, a.Blob.Data...)
		return blobEnds(a.Blob), nil
	}})
	if err != nil {
		return nil, err
	}
	return doc, nil
}

func blobEnds(b *pfkey.Blob) bool { return uint64(b.Offset)+uint64(len(b.Data)) >= uint64(b.Total) }
