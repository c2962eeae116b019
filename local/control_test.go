package local_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/local"
)

// Everything that is not public is refused when a call is made, in whatever way
// it is written.
func TestControl08CallbacksGoToPublicAddresses(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.CallbackAllow = []string{}
	s := newAsyncStack(t, cfg, nil)
	refused := func(url string, status int, code string) {
		t.Helper()
		resp, body := s.do("POST", "/async-function/job", "x", "X-Callback-Url", url)
		if resp.StatusCode != status || !strings.Contains(body, `"`+code+`"`) {
			t.Errorf("%s: %d %s, want %d %s", url, resp.StatusCode, body, status, code)
		}
	}
	for _, host := range []string{
		"127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
		"100.64.0.1", "100.127.255.255", "100.100.100.200", "192.0.0.1", "192.0.2.7", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
		"[::]", "[::1]", "[::127.0.0.1]", "[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[fc00::1]", "[fd00:ec2::254]",
		"[fe80::1]", "[fe80::1%25eth0]", "[fec0::1]", "[ff02::1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2001:db8::1]", "[2001::1]", "[100::1]",
	} {
		refused("http://"+host+"/x", http.StatusForbidden, "callback_not_allowed")
		refused("https://"+host+":8443/x", http.StatusForbidden, "callback_not_allowed")
	}
	for _, url := range []string{"x", "//host/x", "file:///etc/passwd", "gopher://1.2.3.4/x", "ftp://1.2.3.4/", "http://", "http:///x", "http://user:pw@1.2.3.4/",
		"http://user@1.2.3.4/", "http://1.2.3.4:0/", "http://1.2.3.4:70000/", "http://1.2.3.4:x/", "javascript:alert(1)", "http://" + strings.Repeat("a", 3000) + "/"} {
		refused(url, http.StatusBadRequest, "bad_callback_url")
	}
}

// verify is what the receiver of a callback does.
func verify(key, header, body string, now time.Time) error {
	fields := strings.Split(header, ",")
	stamp, ok := strings.CutPrefix(fields[0], "t=")
	unix, err := strconv.ParseInt(stamp, 10, 64)
	if !ok || err != nil {
		return fmt.Errorf("no time in %q", header)
	}
	if age := now.Sub(time.Unix(unix, 0)); age > 5*time.Minute || age < -5*time.Minute {
		return fmt.Errorf("made %v ago", age)
	}
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte(stamp + "." + body))
	want := mac.Sum(nil)
	for _, f := range fields[1:] {
		if sum, err := hex.DecodeString(strings.TrimPrefix(f, "v1=")); err == nil && hmac.Equal(sum, want) {
			return nil
		}
	}
	return fmt.Errorf("%q is of another key or body", header)
}

// A callback can be told from a forged one, with either key while they rotate.
func TestControl09CallbacksAreSigned(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.SigningKeyFile = filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(cfg.SigningKeyFile, []byte("old key\r\nnew key\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newAsyncStack(t, cfg, nil)
	k := newSink(t, nil)
	id := s.post("", "hello", "X-Callback-Url", k.URL)
	eventually(t, 10*time.Second, "the callback", func() bool { return len(k.of(id)) > 0 })
	got, now := k.of(id)[0], time.Now()
	header := got.header.Get(local.SignatureHeader)
	for _, key := range []string{"old key", "new key"} {
		if err := verify(key, header, got.body, now); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
	for name, err := range map[string]error{
		"another key":  verify("a key", header, got.body, now),
		"another body": verify("old key", header, got.body+"!", now),
		"later":        verify("old key", header, got.body, now.Add(6*time.Minute)),
		"another time": verify("old key", "t=1"+strings.TrimPrefix(header, "t="), got.body, now),
	} {
		if err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}
