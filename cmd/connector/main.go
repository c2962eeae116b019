// Command connector lets messages call functions, and keeps the record of
// replicas. It is configured by its environment: see docs/CONNECTOR.md.
package main

import "github.com/sheaf-project/sheaf/connector"

func main() { connector.Main() }
