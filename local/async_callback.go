package local

// async_callback.go tells the callers of calls what came of them: where a
// callback may go, and how it is sent.

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	callbackTimeout = 10 * time.Second
	callbackAnswer  = 1 << 10 // bytes that are read of an answer
	lookupTimeout   = 2 * time.Second
	maxCallbackURL  = 2048
)

// asyncCallback is a callback as it is stored.
type asyncCallback struct {
	ID, Addressed, URL string
	Created            time.Time
	Answer             asyncAnswer
}

// tell queues the callback of a call that is over.
func (a *asyncQueue) tell(c *asyncCall, key string, rec record, answer asyncAnswer) (done bool) {
	if rec.Callback == nil || rec.Callback.State != callbackPending {
		return true
	}
	subject := generationOf(key, rec.Redrives)
	err := a.store(a.life, callbackSubject+subject,
		pack(asyncCallback{ID: c.ID, Addressed: c.Addressed, URL: c.Callback, Created: c.Created, Answer: answer}),
		jetstream.WithExpectLastSequencePerSubject(0), jetstream.WithMsgID(subject+"."+strconv.FormatInt(c.Created.UnixNano(), 10)))
	if err == nil {
		return true
	}
	if !errors.Is(err, errRefused) {
		return false
	}
	// There is no room: the caller can still read the result.
	return a.told(key, rec.Redrives, func(d *delivered) { d.State, d.Error = callbackFailed, err.Error() }) == nil
}

// tellAgain queues the callback of a call that was over when it came again: a
// stop came between its end and its callback.
func (a *asyncQueue) tellAgain(c *asyncCall, key string, rec record) (done bool) {
	if rec.Callback == nil || rec.Callback.State != callbackPending {
		return true
	}
	var answer asyncAnswer
	err := a.persist(a.life, func(ctx context.Context) error {
		m, err := a.results.GetLastMsgForSubject(ctx, resultSubject+key)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			answer = problemAnswer(wire.Refuse(http.StatusGone, "result_gone", "the result was dropped before it could be sent"))
			return nil
		case err != nil:
			return err
		}
		return unpack(m.Data, &answer)
	})
	return err == nil && a.tell(c, key, rec, answer)
}

// told notes how far a callback has come.
func (a *asyncQueue) told(key string, redrives int, f func(*delivered)) error {
	_, err := a.change(a.life, key, record{}, func(r *record) bool {
		if r.Callback == nil || r.Redrives != redrives {
			return false
		}
		f(r.Callback)
		return true
	})
	return err
}

// callback tries once to send a callback.
func (a *asyncQueue) callback(msg jetstream.Msg) (wait time.Duration, done bool) {
	key, redrives := generation(msg.Subject(), callbackSubject)
	meta, err := msg.Metadata()
	var c asyncCallback
	if err == nil {
		err = unpack(msg.Data(), &c)
	}
	if err != nil {
		a.log.Error("stored callback is not readable and is dropped", "call", key, "err", err)
		return 0, true
	}
	tries := int(meta.NumDelivered)
	err = a.send(a.life, &c)
	if err != nil && a.life.Err() != nil {
		return 0, false
	}
	_, forbidden := errors.AsType[*wire.Problem](err)
	state := callbackPending
	switch {
	case err == nil:
		state = callbackDelivered
	case forbidden, tries >= a.cfg.CallbackTries, time.Since(meta.Timestamp) >= a.cfg.CallbackFor:
		state = callbackFailed
		a.log.Warn("callback is given up", "function", c.Addressed, "call", c.ID, "tries", tries, "err", err)
	}
	// A callback that arrived must not be sent again because this cannot be
	// noted.
	_ = a.told(key, redrives, func(d *delivered) {
		d.State, d.Tries, d.Error = state, tries, ""
		if err != nil {
			d.Error = err.Error()
		}
	})
	return backOff(a.cfg.CallbackMinWait, a.cfg.CallbackMaxWait, tries), state != callbackPending
}

// send posts a callback. Whatever is not a 2xx is an error, a redirect too.
func (a *asyncQueue) send(ctx context.Context, c *asyncCallback) error {
	ctx, cancel := context.WithTimeout(ctx, callbackTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL, bytes.NewReader(c.Answer.Body))
	if err != nil {
		return err
	}
	req.GetBody = nil // each try is counted
	maps.Copy(req.Header, c.Answer.Header)
	endToEnd(req.Header)
	req.Header.Del("Set-Cookie")
	req.Header.Del("Cookie")
	for name, value := range map[string]string{
		"User-Agent":         a.front.servedBy(),
		"X-Call-Id":          c.ID,
		"X-Function-Name":    c.Addressed,
		"X-Function-Status":  strconv.Itoa(c.Answer.Status),
		"X-Duration-Seconds": strconv.FormatFloat(c.Answer.Seconds, 'f', 6, 64),
		"X-Start-Time":       strconv.FormatInt(c.Created.UnixNano(), 10),
		"X-Served-By":        a.front.servedBy(),
	} {
		req.Header.Set(name, value)
	}
	req.Header.Del(SignatureHeader)
	if a.cfg.SigningKeyFile != "" {
		key, err := a.cfg.key()
		if err != nil {
			return err // better late than unsigned
		}
		req.Header.Set(SignatureHeader, sign(key, time.Now(), c.Answer.Body))
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, callbackAnswer)); err != nil {
		a.log.Debug("answer to a callback breaks off", "call", c.ID, "err", err)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("the callback was answered with %s", resp.Status)
	}
	return nil
}

// SignatureHeader is the header of a signed callback; see
// AsyncConfig.SigningKeyFile.
const SignatureHeader = "X-Sheaf-Signature"

func sign(key []byte, now time.Time, body []byte) string {
	t := strconv.FormatInt(now.Unix(), 10)
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}

// allowList is where callbacks may go beside public addresses.
type allowList struct {
	nets  []netip.Prefix
	hosts map[string]bool // host:port
}

func newAllowList(entries []string) (allowList, error) {
	l := allowList{hosts: make(map[string]bool)}
	for _, e := range entries {
		if p, err := netip.ParsePrefix(e); err == nil {
			l.nets = append(l.nets, p.Masked())
		} else if addr, err := netip.ParseAddr(e); err == nil {
			l.nets = append(l.nets, netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()))
		} else if host, port, err := net.SplitHostPort(e); err == nil && host != "" && port != "" {
			l.hosts[net.JoinHostPort(strings.ToLower(host), port)] = true
		} else {
			return l, fmt.Errorf("async: callback allow-list entry %q must be an address, a CIDR or host:port", e)
		}
	}
	return l, nil
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

// check refuses an address that callbacks may not go to.
func (l allowList) check(addr netip.Addr) *wire.Problem {
	addr = addr.Unmap().WithZone("")
	for _, n := range l.nets {
		if n.Contains(addr) {
			return nil
		}
	}
	for _, n := range special {
		if n.Contains(addr) {
			return wire.Refuse(http.StatusForbidden, "callback_not_allowed",
				fmt.Sprintf("callbacks to %s are not allowed: it is not a public address, and not on the allow-list of the stack", addr)).About("X-Callback-Url")
		}
	}
	return nil
}

// checkCallback refuses a callback that could not be sent. The host's
// addresses are looked at again when it is: a name may lead elsewhere by then.
func (a *asyncQueue) checkCallback(ctx context.Context, raw string) *wire.Problem {
	bad := func(why string) *wire.Problem {
		return wire.Refuse(http.StatusBadRequest, "bad_callback_url",
			fmt.Sprintf("X-Callback-Url %q %s; it must be such as https://example.com/done", wire.Cut(raw), why)).About("X-Callback-Url")
	}
	if len(raw) > maxCallbackURL {
		return bad(fmt.Sprintf("is over %d bytes", maxCallbackURL)).Within(maxCallbackURL)
	}
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return bad("is not a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("is not http or https")
	case u.Hostname() == "":
		return bad("names no host")
	case u.User != nil:
		return bad("holds a user's name, which callbacks do not send")
	}
	port := u.Port()
	if n, err := strconv.ParseUint(port, 10, 16); port != "" && (err != nil || n == 0) {
		return bad("has a port that cannot be")
	}
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if a.allow.hosts[net.JoinHostPort(strings.ToLower(u.Hostname()), port)] {
		return nil
	}
	addrs, err := a.addresses(ctx, u.Hostname())
	if err != nil {
		return nil // the name may be there when the callback is sent
	}
	for _, addr := range addrs {
		if p := a.allow.check(addr); p != nil {
			return p
		}
	}
	return nil
}

func (a *asyncQueue) addresses(ctx context.Context, host string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	return a.cfg.Lookup(ctx, host)
}

// callbackClient sends callbacks: by no proxy, along no redirect, with no
// cookies, and to no address that is not allowed, whatever its name led to
// before. Connections are not kept: each callback's address is looked at.
func (a *asyncQueue) callbackClient() *http.Client {
	dial := func(ctx context.Context, network, hostport string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(hostport)
		if err != nil {
			return nil, err
		}
		named := a.allow.hosts[strings.ToLower(hostport)]
		d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, address string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if err != nil || named {
				return err
			}
			if p := a.allow.check(to.Addr()); p != nil {
				return p
			}
			return nil
		}}
		addrs, err := a.addresses(ctx, host)
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
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true, TLSHandshakeTimeout: 5 * time.Second,
			MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       callbackTimeout,
	}
}
