struct Mod : ModDefaults {};
