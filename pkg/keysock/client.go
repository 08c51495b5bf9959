package keysock

import (
	"context"
	"encoding/json"
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
)

type Client struct{ events chan Event }

func Dial(ctx context.Context, path string) (*Client, error) { return nil, ErrClosed }
func (c *Client) Close() error                               { return nil }
func (c *Client) Register(ctx context.Context, protos ...ipsec.Protocol) (Supported, error) {
	return Supported{}, ErrClosed
}
func (c *Client) Events() <-chan Event                                         { return c.events }
func (c *Client) GetSPI(ctx context.Context, g GetSPI) (ipsec.SPI, error)      { return 0, ErrClosed }
func (c *Client) Add(ctx context.Context, p *ipsec.SAParams, seq uint32) error { return ErrClosed }
func (c *Client) Update(ctx context.Context, p *ipsec.SAParams, seq uint32) error {
	return ErrClosed
}
func (c *Client) Delete(ctx context.Context, id ipsec.SAID, src netip.Addr) error { return ErrClosed }
func (c *Client) Get(ctx context.Context, id ipsec.SAID, src netip.Addr) (*SAInfo, error) {
	return nil, ErrClosed
}
func (c *Client) Flush(ctx context.Context, proto ipsec.Protocol) error { return ErrClosed }
func (c *Client) Dump(ctx context.Context, proto ipsec.Protocol) ([]*SAInfo, error) {
	return nil, ErrClosed
}
func (c *Client) AcquireFailed(ctx context.Context, seq uint32, errno syscall.Errno) error {
	return ErrClosed
}
func (c *Client) AddPolicy(ctx context.Context, p *ipsec.Policy) (*ipsec.Policy, error) {
	return nil, ErrClosed
}
func (c *Client) UpdatePolicy(ctx context.Context, p *ipsec.Policy) (*ipsec.Policy, error) {
	return nil, ErrClosed
}
func (c *Client) DeletePolicy(ctx context.Context, dir ipsec.Direction, sel ipsec.Selector) error {
	return ErrClosed
}
func (c *Client) DeletePolicyID(ctx context.Context, id uint32) error { return ErrClosed }
func (c *Client) GetPolicy(ctx context.Context, id uint32) (*PolicyInfo, error) {
	return nil, ErrClosed
}
func (c *Client) DumpPolicies(ctx context.Context) ([]*PolicyInfo, error) { return nil, ErrClosed }
func (c *Client) FlushPolicies(ctx context.Context) error                 { return ErrClosed }
func (c *Client) Begin(ctx context.Context) error                         { return ErrClosed }
func (c *Client) Commit(ctx context.Context) error                        { return ErrClosed }
func (c *Client) Abort(ctx context.Context) error                         { return ErrClosed }
func (c *Client) Status(ctx context.Context) (json.RawMessage, error)     { return nil, ErrClosed }
