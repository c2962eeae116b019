package gateway

import "time"

// SetSilence shortens the time after which a silent stream is dead.
func (c *Client) SetSilence(d time.Duration) { c.silence = d }
