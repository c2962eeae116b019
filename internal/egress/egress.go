// Package egress makes calls to URLs that strangers have named: of callbacks,
// and of inputs. Such a URL must not lead to what only this machine or its
// cluster can reach, by whatever name, and wherever the name leads by then: the
// address is looked at again when the connection is made. Redirects are not
// followed, and no proxy of the environment stands between.
package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	lookupTimeout = 2 * time.Second
	dialTimeout   = 5 * time.Second
	maxURL        = 2048 // bytes
)

// Config says where calls may go, and how a refusal says so.
type Config struct {
	Param   string // that holds the URL, such as X-Callback-Url
	Code    string // the codes are bad_CODE_url and CODE_not_allowed
	Calls   string // what the calls are, as in "callbacks to"
	List    string // what allows more, as in "the allow-list of the stack"
	Example string // of a URL
	// Allow lists where calls may go beside public addresses: each an address, a
	// CIDR or host:port.
	Allow []string
	// Lookup finds the addresses of a host; nil means the system's resolver.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
}

// A Policy is where calls may go. It may be used concurrently.
type Policy struct {
	cfg   Config
	nets  []netip.Prefix
	hosts map[string]bool // host:port
}

// New returns a Policy. The error names the entry of Allow that is none.
func New(cfg Config) (*Policy, error) {
	p := &Policy{cfg: cfg, hosts: make(map[string]bool)}
	if p.cfg.Lookup == nil {
		p.cfg.Lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	for _, e := range cfg.Allow {
		if n, err := netip.ParsePrefix(e); err == nil {
			p.nets = append(p.nets, n.Masked())
		} else if addr, err := netip.ParseAddr(e); err == nil {
			p.nets = append(p.nets, netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()))
		} else if host, port, err := net.SplitHostPort(e); err == nil && host != "" && port != "" {
			p.hosts[net.JoinHostPort(strings.ToLower(host), port)] = true
		} else {
			return nil, fmt.Errorf("entry %q must be an address, a CIDR or host:port", e)
		}
	}
	return p, nil
}

// special are the ranges that are not public, or lead to ones that are not.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"), // metadata services, too
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("224.0.0.0/3"),  // multicast, reserved, broadcast
	netip.MustParsePrefix("::/96"),        // unspecified, loopback, v4-compatible
	netip.MustParsePrefix("64:ff9b::/96"), // NAT64: any v4 address
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("100::/64"),
	netip.MustParsePrefix("2001::/32"), // Teredo: any v4 address
	netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("2002::/16"), // 6to4: any v4 address
	netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("fec0::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// address refuses an address that calls may not go to.
func (p *Policy) address(addr netip.Addr) *wire.Problem {
	addr = addr.Unmap().WithZone("")
	for _, n := range p.nets {
		if n.Contains(addr) {
			return nil
		}
	}
	for _, n := range special {
		if n.Contains(addr) {
			return wire.Refuse(http.StatusForbidden, p.cfg.Code+"_not_allowed",
				fmt.Sprintf("%s %s are not allowed: it is not a public address, and not on %s", p.cfg.Calls, addr, p.cfg.List)).About(p.cfg.Param)
		}
	}
	return nil
}

// Check refuses a URL that could not be called. A host that has no address now
// is not refused: it may have one when it is called.
func (p *Policy) Check(ctx context.Context, raw string) *wire.Problem {
	shown := raw
	u, err := url.Parse(raw)
	if err == nil {
		shown = u.Redacted() // without a password
	}
	bad := func(why string) *wire.Problem {
		return wire.Refuse(http.StatusBadRequest, "bad_"+p.cfg.Code+"_url",
			fmt.Sprintf("%s %q %s; it must be such as %s", p.cfg.Param, wire.Cut(shown), why, p.cfg.Example)).About(p.cfg.Param)
	}
	if len(raw) > maxURL {
		return bad(fmt.Sprintf("is over %d bytes", maxURL)).Within(maxURL)
	}
	switch {
	case err != nil:
		return bad("is not a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("is not http or https")
	case u.Hostname() == "":
		return bad("names no host")
	case u.User != nil:
		return bad("holds a user's name, which is not sent")
	}
	port := u.Port()
	if n, err := strconv.ParseUint(port, 10, 16); port != "" && (err != nil || n == 0) {
		return bad("has a port that cannot be")
	}
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if p.hosts[net.JoinHostPort(strings.ToLower(u.Hostname()), port)] {
		return nil
	}
	addrs, err := p.addresses(ctx, u.Hostname())
	if err != nil {
		return nil // the name may be there when it is called
	}
	for _, addr := range addrs {
		if no := p.address(addr); no != nil {
			return no
		}
	}
	return nil
}

func (p *Policy) addresses(ctx context.Context, host string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	return p.cfg.Lookup(ctx, host)
}

// Client returns a client that calls no address that is not allowed, whatever
// its name led to before: it fails with a *wire.Problem inside. It uses no
// proxy, follows no redirect, has no cookies, does not decompress, and keeps no
// connection: each call's address is looked at. timeout is for a whole call, 0
// for none.
func (p *Policy) Client(timeout time.Duration) *http.Client {
	dial := func(ctx context.Context, network, hostport string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(hostport)
		if err != nil {
			return nil, err
		}
		named := p.hosts[strings.ToLower(hostport)]
		d := net.Dialer{Timeout: dialTimeout, Control: func(_, address string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if err != nil || named {
				return err
			}
			if no := p.address(to.Addr()); no != nil {
				return no
			}
			return nil
		}}
		addrs, err := p.addresses(ctx, host)
		if err == nil && len(addrs) == 0 {
			err = fmt.Errorf("%s has no address", host)
		}
		var failed error
		for _, addr := range addrs {
			conn, err := d.DialContext(ctx, network, net.JoinHostPort(addr.String(), port))
			if err == nil {
				return conn, nil
			}
			failed = errors.Join(failed, err)
		}
		return nil, errors.Join(err, failed)
	}
	return &http.Client{
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true, TLSHandshakeTimeout: dialTimeout,
			ResponseHeaderTimeout: 30 * time.Second, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       timeout,
	}
}
